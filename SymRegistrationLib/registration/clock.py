"""Seconds per stage of a run, and its progress as a whole."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..job import Progress

#: Share of the whole run that each stage is expected to take, for progress.
SHARES = {"prepare": 0.05, "align": 0.2, "method": 0.55, "output": 0.2}


@dataclass
class Clock:
    """Seconds per stage, and progress as a share of the whole run."""

    progress: Progress
    seconds: dict = field(default_factory=dict)
    base: float = 0.0
    stage: str = ""
    started: float = 0.0

    def enter(self, stage: str, message: str) -> None:
        self.leave()
        self.stage, self.started = stage, time.perf_counter()
        self.progress(stage, self.base, message)

    def leave(self) -> None:
        if self.stage:
            self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.started
            self.base += SHARES[self.stage]
            self.stage = ""

    def move(self, stage: str, part: str, seconds: float) -> None:
        """Count ``seconds`` of a stage as a part of its own."""
        self.seconds[stage], self.seconds[part] = self.seconds[stage] - seconds, seconds

    def told(self) -> dict[str, float]:
        """Seconds per stage and in total, for metrics.json."""
        return {
            **{name: round(s, 3) for name, s in self.seconds.items()},
            "total": round(sum(self.seconds.values()), 3),
        }

    def inner(self, stage: str, fraction: float, message: str) -> None:
        """Progress call-back for what runs inside the present stage."""
        self.progress(stage, self.base + SHARES[self.stage] * min(max(fraction, 0.0), 1.0), message)
