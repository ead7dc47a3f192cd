"""Ctrl-C and SIGTERM during training: granted after the step under way, with the state saved.

Standard library only. A scheduler that ends a job, and a person who does, lose nothing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ..job import RegistrationError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper:
    """Turns the first signal into a wish; the second ends the process at once, as it would have without this.

    Args:
        active: ``False`` leaves the signals as they are.
    """

    def __init__(self, active: bool = True):
        self.number = 0
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in _SIGNALS if self._active else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # a background job ignores Ctrl-C
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
        self.number = number

    def told(self, step: int) -> RegistrationError:
        """What to say, with the exit code of the signal (130 or 143)."""
        error = RegistrationError(
            f"stopped after step {step}; the state is saved.", "Give the same command again to go on."
        )
        error.exit_code = 128 + self.number
        return error
