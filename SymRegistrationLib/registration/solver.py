"""The chosen method on its working grid(s): network or optimiser, then refinement; a perturbed copy of the
same on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..fields import FieldPair, gaussian, resize, resize_field, warp
from ..job import Options, Progress, silent
from ..losses import ncc
from . import contrasts, devices, memory, methods, optimisers, sliding, working_grid
from .alignment import Alignment, shows_one_contrast, split_midway
from .evidence import detail_is_noise
from .optimisers import RunSettings
from .presets import presets
from .steering import Steering
from .working_grid import Layout, Scan, WorkingPair

#: Room around the content of both scans, as a share of its longest side: where a network works, and where the optimiser
#: does. Without forces out there the optimiser's field only has to fade, which it does beyond the grid as well: 0.015
#: has the overlap of 0.06 with 0.6 of its voxels (four development brains).
ROOM, MARGIN = 0.06, 0.015


class Perturbation(Protocol):
    """A change of a run that should not matter, see :class:`SymRegistrationLib.uncertainty.predictors.Perturbation`."""

    stiffness: float
    seed: int

    def intensities(self, space: WorkingPair) -> WorkingPair:
        """The pair with brightness and noise changed."""

    def geometry(self, space: WorkingPair) -> WorkingPair:
        """The pair exchanged, mirrored, resampled."""

    def undone(self, pair: FieldPair) -> FieldPair:
        """A result of the changed geometry, in the original frame."""


class Solver:
    """One method on one pair of scans.

    Args:
        scans: fixed and moving, prepared.
        pose: their initial alignment.
        options: of the run.
        notes: gets what was done other than asked, in words.
        further: scans of further contrasts, pair by pair, where those of ``scans`` are.
        regions: what slides in the two scans.

    Attributes:
        space: the working pair that results refer to; for a refined network that finds the pose itself
            only after :meth:`run`.
        similarity: what the optimiser maximises, ``network`` where none runs.
        learned: whether the method is a network.
        smooth: whether the unperturbed run found that the images do not insist on detail.

    Raises:
        InputError: a working voxel whose grid does not fit the memory; scans that do not overlap.
    """

    def __init__(
        self,
        scans: tuple[Scan, Scan],
        pose: Alignment,
        options: Options,
        notes: list[str],
        further: Sequence[tuple[Scan, Scan]] = (),
        regions: tuple[sliding.Regions, sliding.Regions] | None = None,
    ):
        self.scans, self.pose, self.options, self.notes = scans, pose, options, notes
        self.further, self.regions = tuple(further), regions
        self.steer: Callable[[WorkingPair], Steering] | None = None  # set by who wants to steer the optimiser
        self.finest = float(min(scan.grid.spacing.min() for scan in scans))
        self.preset = presets()[options.preset]
        self.learned = methods.is_learned(options.method)
        self.optimiser = optimisers.create(optimisers.REFINER if self.learned else options.method)
        # A network that finds the pose itself must see all of both scans.
        whole = self.learned and pose.kind in ("none", "centre")
        self.similarity, self.smooth = "network", False
        refined = not self.learned or options.refine > 0
        if options.spacing:
            need = self.optimiser.card.bytes_per_voxel if refined else memory.FEEDING_BYTES
            voxels = self._volume(pose, whole) / options.spacing**3
            memory.check_spacing(options.spacing, voxels, need, self._room())
        if self.learned:
            from .. import networks
            from . import inference  # learned methods are loaded only when asked for

            spacing = options.spacing or inference.working_spacing(options.method, options)
            self.coarse = self._space(pose, spacing, networks.card(options.method).size_multiple, whole)
        if not refined and not whole:
            self.space = self.coarse
        elif whole:
            self.space = None  # type: ignore[assignment]  # it follows from what the network finds
        else:
            self._refine_on(pose)

    def other(self, name: str) -> Solver:
        """The same scans in the same pose for another method, with its shipped weights and its own switches."""
        options = replace(self.options, method=name, weights=None, method_options={}, ensemble="", average=False)
        return Solver(self.scans, self.pose, options, self.notes)

    def run(self, progress: Progress = silent, perturbation: Perturbation | None = None) -> FieldPair:
        """The field pair on :attr:`space`; under a perturbation, brought back to the original frame."""
        stiffness = 1.0 if perturbation is None else perturbation.stiffness
        if not self.learned:
            space = self.space
            if perturbation is not None:
                space = perturbation.geometry(perturbation.intensities(space))
            steering = self._steering(space, perturbation)
            pair = self.optimiser.run(space, self._settings(stiffness, progress=progress, steering=steering))
            if perturbation is not None:
                return perturbation.undone(pair)
            return self._earned(pair, steering, progress)
        share = 0.5 if self.options.refine else 1.0
        pair = self._predict(lambda stage, f, text: progress(stage, share * f, text), perturbation)
        if not self.options.refine:
            return self._recentred(pair)
        if self.space is None:
            self._refine_on(self._found(pair))
        space = self.space if perturbation is None else perturbation.intensities(self.space)
        start = working_grid.to_working_grid(pair, self.coarse, space)
        settings = self._settings(
            stiffness,
            start=start,
            levels=self.options.refine,
            progress=lambda stage, f, text: progress(stage, share + (1 - share) * f, text),
            steering=self._steering(space, perturbation),
        )
        return self.optimiser.run(space, settings)

    def _earned(self, pair: FieldPair, steering: Steering | None, progress: Progress) -> FieldPair:
        """The result of the images alone, or a smoother one where its detail did not earn its place."""
        given = steering is not None and steering.decides
        halves = pair.details.get("halves")
        judged = self.similarity == "lncc" and not given
        self.smooth = judged and halves is not None and detail_is_noise(self.space, halves)
        if not self.smooth:
            return pair
        self.notes.append("detail in the deformation added little that the scans share, so it was kept smooth")
        again = self._settings(
            1.0,
            progress=lambda stage, _, text: progress(stage, 1.0, text),
            steering=self._steering(self.space, None),
        )
        return self.optimiser.run(self.space, again)

    def _settings(self, stiffness: float, **more: Any) -> RunSettings:
        """Settings of the optimiser for this pair; ``stiffness`` on top of what the user asks for."""
        stiffness *= self.options.stiffness
        return RunSettings(
            self.preset,
            self.similarity,
            stiffness=stiffness,
            one_patient=self.pose.one_patient,
            smooth=self.smooth,
            **more,
        )

    def fall_back(self, state: str) -> FieldPair:
        """Give up the method's result: no deformation, at the alignment (``aligned``) or as the headers lie
        (``as scanned``). :attr:`space` and :attr:`pose` follow."""
        if state == "as scanned":
            before = self.pose
            self.pose = Alignment(np.eye(4), np.eye(4), "none", candidates=before.candidates, reasons=before.reasons)
            self.space = self._space(self.pose, float(self.space.grid.spacing[0]))
        nothing = self.space.fixed.new_zeros((1, 3, *self.space.grid.shape))
        return FieldPair(nothing, nothing.clone(), "symmetric", 0.0)

    def _steering(self, space: WorkingPair, perturbation: Perturbation | None) -> Steering | None:
        """What steers the optimiser; perturbed runs, which ask how sure the images are, are not steered."""
        return None if self.steer is None or perturbation is not None else self.steer(space)

    def _volume(self, pose: Alignment, whole: bool = False) -> float:
        halves = pose.mid_to_fixed, pose.mid_to_moving
        margin = ROOM if whole else MARGIN
        return working_grid.working_grid(*self.scans, *halves, Layout(self.finest * 2, 1, whole, margin)).volume

    def _space(
        self, pose: Alignment, spacing: float, multiple: int = 1, whole: bool = False, margin: float = ROOM
    ) -> WorkingPair:
        halves = pose.mid_to_fixed, pose.mid_to_moving
        return working_grid.working_pair(*self.scans, *halves, Layout(spacing, multiple, whole, margin))

    def _refine_on(self, pose: Alignment) -> None:
        """Lay the optimiser's grid over what both scans show at this pose, and choose its similarity."""
        budget = self._voxel_budget()
        spacing = self.options.spacing or max(self.finest, (self._volume(pose) / budget) ** (1 / 3))
        space = contrasts.beside(self._space(pose, spacing, margin=MARGIN), self.further, self.options)
        self.space = sliding.with_regions(space, self.regions)
        linear = not self.learned and self.optimiser.card.pose
        asked, available = self.options.similarity, self.optimiser.card.similarities
        self.similarity = pose.measure if linear else _similarity(asked, self.scans, pose, self.notes, available)

    def _found(self, pair: FieldPair) -> Alignment:
        """The affine part of what a network found from the headers, and how alike it makes the scans."""
        found = split_midway(*working_grid.fit_affine(pair, self.coarse), "affine")
        alike = 1 - float(ncc(self.coarse.fixed, warp(self.coarse.moving, pair.fixed_to_moving)))
        return replace(found, similarity=alike)

    def _recentred(self, pair: FieldPair) -> FieldPair:
        """A network's result on the working pair at the pose that it found itself.

        From the headers its field holds a whole pose; a lattice that fades out at its border would fold there.
        """
        if self.space is self.coarse:
            return pair
        if self.space is None:
            self.space = self._space(self._found(pair), float(self.coarse.grid.spacing[0]), whole=True)
        return replace(working_grid.to_working_grid(pair, self.coarse, self.space), details=pair.details)

    def _predict(self, progress: Progress, perturbation: Perturbation | None) -> FieldPair:
        from . import inference

        space, name = self.coarse, self.options.method
        if perturbation is None:
            pair = inference.run_network(space.moving, space.fixed, name, self.options, progress=progress)
        else:
            pair = predict_perturbed(
                perturbation.geometry(perturbation.intensities(space)), self.options, perturbation, progress
            )
        for note in pair.details.get("notes", ()):
            if note not in self.notes:
                self.notes.append(note)
        return pair if perturbation is None else perturbation.undone(pair)

    def _room(self, share: float = 1.0) -> float:
        return memory.room(self.scans[0].image.device, self.options.memory_gb, share)

    def _voxel_budget(self) -> float:
        """Voxels of the working grid: what the preset wants, or what fits the memory, said aloud."""
        room = self._room(memory.OPTIMISER_SHARE)
        fits = max(room / self.optimiser.card.bytes_per_voxel, 10_000)
        if fits < self.preset.voxels:
            self.notes.append(
                f"the working grid was coarsened to {fits:.3g} voxels to stay within {room / 1e9:.1f} GB of memory"
            )
        return min(self.preset.voxels, fits)


def predict_perturbed(space: WorkingPair, options: Options, change: Perturbation, progress: Progress) -> FieldPair:
    """A network under a perturbation: dropping where it has dropout, and seeing a coarser grid where it
    shall be stiffer."""
    from . import inference

    network = inference.load_network(options.method, options, devices.resolve(options.device))
    shape = tuple(space.fixed.shape[2:])
    images = [space.moving, space.fixed]
    if change.stiffness > 1:
        least = network.card.minimum_size // 2
        coarse = [max(min(n, least), round((n - 1) / change.stiffness) + 1) for n in shape]
        sigma = [0.5 * max(((n - 1) / max(m - 1, 1)) ** 2 - 1, 0) ** 0.5 for n, m in zip(shape, coarse)]
        images = [resize(gaussian(image, sigma), coarse) for image in images]
    with inference.dropout_at_work(network, change.seed):
        pair = inference.run_network(images[0], images[1], options.method, options, network, progress)
    there, back = (resize_field(u, shape) for u in (pair.fixed_to_moving, pair.moving_to_fixed))
    return FieldPair(there, back, pair.inverse_method, pair.residual, pair.details)


def _similarity(
    asked: str, scans: tuple[Scan, Scan], pose: Alignment, notes: list[str], available: Sequence[str]
) -> str:
    """The optimiser's similarity; ``auto`` decides by whether the aligned scans show one contrast, and takes the first
    that is available where that one is not."""
    if asked == "mi":
        return "mind"  # mutual information steers the alignment; its local counterpart in the optimiser is MIND
    if asked != "auto":
        return asked
    best = "lncc" if shows_one_contrast(*scans, pose) else "mind"
    if best not in available:
        return available[0]
    if best == "mind":
        notes.append("the scans look like different contrasts; the modality-independent similarity 'mind' was used")
    return best
