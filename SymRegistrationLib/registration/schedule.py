"""How the optimiser walks from coarse to fine: levels, steps and smoothing, by preset and by what is registered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .presets import Preset


@dataclass(frozen=True)
class Schedule:
    """How the optimiser walks from coarse to fine.

    Attributes:
        shrink: factor of each level, coarse to fine; 1 = the working grid itself.
        iterations: most steps per level.
        step: length of the longest updates, voxels of the level.
        window: of the local correlation, voxels (odd).
        smooth_update: Gaussian sigma on every update ("fluid"), voxels of the level.
        smooth_total: Gaussian sigma on the half-way fields per step ("elastic"), voxels.
        smooth_every: that smoothing is done after every so many steps, then with the sigma of all of them together:
            half the work of every step, and more overlap at the same strain (RESULTS.md).
        least_determinant: half-way fields are eased where their Jacobian determinant falls below.
        tolerance: a level ends when its similarity gained less than this share of its first value
            in ``patience`` steps.
    """

    shrink: tuple[float, ...] = (4, 2, 1)
    iterations: tuple[int, ...] = (20, 30, 15)
    step: float = 0.6
    window: int = 5
    smooth_update: float = 1.2
    smooth_total: float = 0.7
    smooth_every: int = 2
    least_determinant: float = 0.3
    tolerance: float = 2e-3
    patience: int = 8

    @classmethod
    def of(cls, preset: Preset, levels: int = 0) -> Schedule:
        """The schedule of a preset; with ``levels`` only so many of the finest, with the fewer steps that suffice after
        a network."""
        changes = preset.settings.get("syn", {})
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in changes.items()}
        whole = cls(**values)
        if not levels:
            return whole
        return replace(whole, shrink=whole.shrink[-levels:], iterations=preset.after_network[-levels:])

    def for_one_patient(self, pulled: bool = False) -> Schedule:
        """For two contrasts of one patient, who deforms smoothly: the fine detail of their force is noise that the two
        scans do not share. With the sigmas of one contrast MIND spoiled every pose that was tried (RESULTS.md).

        Where landmarks or labels pull, less smooth: against fields as smooth as the images alone need, six landmarks
        mended a spoiled place less (results/contrasts.md).
        """
        if pulled:
            return replace(self, smooth_update=4.0, smooth_total=0.7)
        return replace(self, smooth_update=12.0, smooth_total=3.0)

    def without_detail(self) -> Schedule:
        """For one contrast whose images do not insist on detail, see ``evidence.detail_is_noise``."""
        return replace(self, smooth_update=6.0, smooth_total=2.0)

    def for_sliding(self) -> Schedule:
        """For regions that slide: where no jump has to be bridged, motion is smoother, and is smoothed more."""
        return replace(self, smooth_update=max(self.smooth_update, 2.0), smooth_total=max(self.smooth_total, 1.4))

    def stiffer(self, factor: float) -> Schedule:
        """The half-way fields smoothed by ``factor`` times the sigma."""
        return replace(self, smooth_total=self.smooth_total * factor)


def schedule_for(
    preset: Preset,
    similarity: str,
    one_patient: bool,
    slides: bool,
    levels: int = 0,
    smooth: bool = False,
    pulled: bool = False,
) -> Schedule:
    """How a run, an update or a repair walks.

    Args:
        preset: how much time it may take.
        similarity: what it maximises.
        one_patient: the alignment found no stretch (``Alignment.one_patient``).
        slides: regions of the scans slide along each other.
        levels: see :meth:`Schedule.of`.
        smooth: detail was found to be noise (``evidence.detail_is_noise``).
        pulled: landmarks or labels pull at what is finished.
    """
    schedule = Schedule.of(preset, levels)
    if smooth:
        schedule = schedule.without_detail()
    if one_patient and similarity == "mind":
        schedule = schedule.for_one_patient(pulled and not slides)
    return schedule.for_sliding() if slides else schedule
