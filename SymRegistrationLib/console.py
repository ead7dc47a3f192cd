"""What a command says: progress with time left, machine-readable events, results as tables, errors in one line.

Standard library only (tqdm when it is there). Results go to stdout, everything else to stderr; with events on,
stdout carries one JSON object a line and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from .job import RegistrationError


def share_cores() -> None:
    """Keep OpenMP's threads from spinning while they wait; to be called before torch is imported.

    Spinning threads of two processes starve each other: two registrations at once took 47 s, with sleeping threads 9 s,
    where one alone takes 6 s. On an idle machine a short spin is kept, which is 10 % faster. What the user set counts.
    """
    busy = not hasattr(os, "getloadavg") or os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1)
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.update({"OMP_WAIT_POLICY": "passive"} if busy else {"GOMP_SPINCOUNT": "2000"})


class Console:
    """The voice of one command.

    Args:
        events: JSON lines on stdout instead of text.
        quiet: no progress, no summary; errors still speak.
        stdout, stderr: for tests.
    """

    def __init__(
        self, events: bool = False, quiet: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ):
        self.events = events
        self.quiet = quiet
        self._out = stdout or sys.stdout
        self._err = stderr or sys.stderr
        self._started = time.monotonic()
        self._stage = ""
        self._bar: Any = None

    def progress(self, stage: str, fraction: float, message: str) -> None:
        """The pipeline's call-back (see :data:`SymRegistrationLib.job.Progress`)."""
        fraction = min(max(fraction, 0.0), 1.0)
        left = self._seconds_left(fraction)
        if self.events:
            self.event("progress", stage=stage, fraction=round(fraction, 4), seconds_left=left, message=message)
        elif not self.quiet:
            self._show(stage, fraction, message, left)
        self._stage = stage

    def event(self, name: str, **fields: Any) -> None:
        """One JSON line on stdout when events are on; not-a-number becomes null, as JSON knows none."""
        if self.events:
            self._out.write(json.dumps(jsonable({"event": name, **fields})) + "\n")
            self._out.flush()

    def result(self, result: Mapping[str, Any], text: str) -> None:
        """The outcome: an event, or ``text`` for people."""
        self.close()
        if self.events:
            self.event("result", result=result)
        elif not self.quiet:
            self._out.write(text.rstrip("\n") + "\n")
            self._out.flush()

    def note(self, text: str) -> None:
        """A warning for people; events carry notes in the result."""
        if not (self.events or self.quiet):
            self.close()
            self._err.write(f"symreg: note: {text}\n")

    def failure(self, text: str) -> None:
        """Why the exit code is 1 although the outputs are there, for who asked not to be shown the outcome."""
        if self.quiet and not self.events:
            self._err.write("symreg: " + " ".join(text.split()) + "\n")
            self._err.flush()

    def error(self, error: RegistrationError, exit_code: int | None = None) -> None:
        """One line on stderr, and an event; ``exit_code`` when it is not the error's own."""
        self.close()
        code = error.exit_code if exit_code is None else exit_code
        self.event("error", message=error.message, hint=error.hint, exit_code=code)
        self._err.write("symreg: error: " + " ".join(str(error).split()) + "\n")
        self._err.flush()

    def close(self) -> None:
        """End the progress bar, so that text starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _seconds_left(self, fraction: float) -> float | None:
        """From the time so far; ``None`` while it would be a guess."""
        elapsed = time.monotonic() - self._started
        if fraction < 0.1 or elapsed < 0.5:
            return None
        return round(elapsed * (1 - fraction) / fraction, 1)

    def _show(self, stage: str, fraction: float, message: str, left: float | None) -> None:
        if self._bar is None and self._err.isatty():
            self._bar = _tqdm(self._err)
        if self._bar is not None:
            ahead = f"{duration(left)} left, " if left is not None else ""
            self._bar.set_description_str(f"{ahead}{message}", refresh=False)
            self._bar.n = round(100 * fraction)
            self._bar.refresh()
        elif stage != self._stage and 0 < fraction < 1:  # inputs may still be refused at 0; the result speaks at 1
            tail = f", about {duration(left)} left" if left is not None else ""
            self._err.write(f"[{100 * fraction:3.0f} %] {stage}: {message}{tail}\n")
            self._err.flush()


def _tqdm(stream: TextIO) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=100, file=stream, leave=False, bar_format="{percentage:3.0f} % |{bar:30}| {desc}")


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``; an empty text for None."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: Any, digits: int = 3) -> str:
    """A number for people: no needless digits, a dash for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header; the first to the left, the others to the right."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    text = [
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def jsonable(value: Any) -> Any:
    """Plain JSON data: numpy numbers and arrays unwrapped, not-a-number and infinity as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
