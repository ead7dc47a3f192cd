"""What can be known of a row before anything is registered: from the headers, in milliseconds per file.

Each file is looked at once, however many rows name it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..geometry.points import paired, read_points
from ..geometry.volumes import read_shape
from ..job import INITIALS, InputError, Job, existing_file
from ..registration.catalogue import needs_weights
from ..registration.memory import NETWORK_GB, SCAN_BYTES, WORKER_GB
from ..registration.presets import presets


class Checker:
    """Checks jobs, remembering every file."""

    def __init__(self) -> None:
        self._known: dict[tuple, Any] = {}

    def problem(self, job: Job, root: Path | None = None) -> str | None:
        """Why the job cannot run, in a sentence, or None.

        Args:
            root: folder that the job's output must lie in, also when links are followed.
        """
        try:
            self.look(job)
            output = Path(job.output)
            if root is not None and output.resolve().parent != root.resolve():
                raise InputError(f"its folder '{output}' is a link that leads elsewhere.", "Remove the link.")
            if output.exists() and not output.is_dir():
                raise InputError(f"'{output}' is a file, where the pair's folder should be.", "Move it away.")
        except InputError as error:
            return str(error)
        return None

    def look(self, job: Job) -> None:
        """Raise InputError for the first thing that is wrong."""
        for side in ("fixed", "moving"):
            self._once(read_shape, getattr(job, side), f"{side} image")
            for number, path in enumerate(getattr(job, f"{side}_contrasts"), 2):
                self._once(read_shape, path, f"{side} contrast {number}")
            for kind in ("mask", "labels"):
                if path := getattr(job, f"{side}_{kind}"):
                    self._once(read_shape, path, f"{side} {kind}")
        if job.fixed_points:
            points = [
                self._once(read_points, getattr(job, f"{side}_points"), f"{side} landmarks")
                for side in ("fixed", "moving")
            ]
            paired(*points)
        options = job.options
        if options.weights:
            existing_file(options.weights, "weights file")
        if options.initial not in INITIALS:
            existing_file(options.initial, "initial transform")
        if needs_weights(options.method) or options.initial not in INITIALS:
            from ..pipeline import check_options

            switches = tuple(sorted(map(str, options.method_options.items())))
            self._once(lambda *_: check_options(options), options.initial, options.method, options.weights, switches)

    def memory_gb(self, job: Job) -> float:
        """What a worker needs for a job that passed, roughly, 10^9 bytes."""
        voxels = 0
        for side in ("fixed", "moving"):
            depth, height, width = self._once(read_shape, getattr(job, side), f"{side} image")
            voxels += depth * height * width
        own = presets()[job.options.preset].memory_gb if not needs_weights(job.options.method) else NETWORK_GB
        return WORKER_GB + own + SCAN_BYTES * voxels / 1e9

    def _once(self, look: Callable, path: str, *what: Any) -> Any:
        """``look(path, *what)``, its answer or its InputError kept."""
        key = (getattr(look, "__name__", ""), path, *what)
        if key not in self._known:
            try:
                self._known[key] = look(path, *what)
            except InputError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, InputError):
            raise found
        return found


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
