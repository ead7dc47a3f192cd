"""Which pair a training step sees: a pure function of seed and position, so that nothing has to be remembered.

A resumed run, or two processes that share the work, see exactly the pairs that one uninterrupted process sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..fields import identity, warp
from ..job import InputError
from .dataset import Cache, Case
from .synthetic import Draw, LabelMap, Pair, Synthesis, label_map, look_up, make_pair, random_poses, voxel_pose

#: Scans and label maps kept in memory.
_KEPT = 256


@dataclass(frozen=True)
class Mixture:
    """What share of the steps sees what; see ``TrainingOptions``."""

    real: float = 0.5
    shapes: float = 0.1
    two_people: float = 0.3
    supervised: float = 0.7


@dataclass(frozen=True, eq=False)
class Sample:
    """A pair and what to learn from it.

    Attributes:
        pair: the scans.
        published: learn by the method's own loss: both scans look alike.
        supervised: learn by labels, true map or landmarks.
    """

    pair: Pair
    published: bool
    supervised: bool


@dataclass(frozen=True)
class Part:
    """Scans, their pairs, and label maps of one split.

    Attributes:
        scans: real scans.
        pairs: (moving, fixed) positions in ``scans``.
        maps: label maps to synthesise from.
    """

    scans: tuple[Case, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    maps: tuple[Case, ...] = ()


class Samples:
    """All pairs of a run.

    Args:
        training, validation: the splits.
        cache: where resampled files are.
        synthesis: how far pairs vary.
        mixture: shares.
        seed: of everything.
        device: where pairs are made; kept as :attr:`device`.
    """

    def __init__(
        self,
        training: Part,
        validation: Part,
        cache: Cache,
        synthesis: Synthesis,
        mixture: Mixture,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        if training.scans and not training.pairs:
            raise InputError("the scans give no pair of two subjects.", "Add scans, or name the subjects in a table.")
        self._training, self._validation = training, validation
        self._synthesis, self._mixture, self._seed = synthesis, mixture, seed
        self.device = torch.device(device)
        self._map = lru_cache(_KEPT)(lambda case: _placed(cache.labels(case), self.device))
        self._scan = lru_cache(_KEPT)(lambda case: _scan(cache.scan(case), cache.spacing, self.device))

    def training(self, position: int, progress: float, published: bool = True) -> Sample:
        """The pair at a position of the endless sequence.

        Args:
            position: optimiser step times pairs a step, plus the pair's place in it.
            progress: of the curriculum, 0..1.
            published: whether the method's own loss is used at all.
        """
        seed = seed_of(self._seed, "training", position)
        draw = Draw(seed_of(self._seed, "choice", position))
        ranges, mix, part = self._synthesis.at(0.2 + 0.8 * progress), self._mixture, self._training
        if part.scans and (not part.maps or draw.chance(mix.real)):
            moving, fixed = part.pairs[draw.integer(0, len(part.pairs) - 1)]
            pair = self._real(part.scans[moving], part.scans[fixed], ranges, seed)
            known = pair.moving_labels is not None or pair.points is not None
            return Sample(pair, published, known and draw.chance(mix.supervised))
        supervised = not published or draw.chance(mix.supervised)
        if not supervised:
            ranges = replace(ranges, one_contrast=1.0)
        return Sample(self._synthetic(part.maps, ranges, draw, seed), not supervised, supervised)

    def validation(self, position: int) -> Pair:
        """A pair of the held-out scans; the same ones at each call. Falls back on shapes."""
        seed = seed_of(self._seed, "validation", position)
        part = self._validation
        kinds = ([part.scans] if part.pairs else []) + ([part.maps] if part.maps else [])
        kind = kinds[position % len(kinds)] if kinds else None
        if kind is part.scans and part.pairs:
            moving, fixed = part.pairs[seed % len(part.pairs)]
            return self._real(part.scans[moving], part.scans[fixed], self._synthesis, seed)
        draw = Draw(seed_of(self._seed, "held out", position))
        if kind is None:
            return make_pair(None, self._synthesis, seed, device=self.device)
        # True maps are known for one person only; every second pair shows two, as in real use.
        first, second = _two(part.maps, draw, (position // len(kinds)) % 2 == 1)
        return make_pair(self._map(first), self._synthesis, seed, self._map(second) if second else None)

    def _synthetic(self, maps: Sequence[Case], ranges: Synthesis, draw: Draw, seed: int) -> Pair:
        if not maps or draw.chance(self._mixture.shapes):
            return make_pair(None, ranges, seed, device=self.device)
        first, second = _two(maps, draw, draw.chance(self._mixture.two_people))
        return make_pair(self._map(first), ranges, seed, self._map(second) if second else None)

    def _real(self, moving: Case, fixed: Case, ranges: Synthesis, seed: int) -> Pair:
        """Two real scans, each in a pose of its own."""
        sides, draw = [], Draw(seed)
        for case, pose in zip((fixed, moving), random_poses(ranges, draw)):
            scan = self._scan(case)
            matrix = voxel_pose(torch.linalg.inv(pose), ranges)
            where = _moved(matrix, identity(ranges.shape, self.device))
            image = warp(scan.image, where - identity(ranges.shape, self.device), padding="zeros")
            labels = None if scan.labels is None else look_up(scan.labels, where)
            points = None if scan.points is None else _moved_points(torch.linalg.inv(matrix), scan.points)
            sides.append((image, labels, points, scan))
        (f, fl, fp, a), (m, ml, mp, b) = sides
        values: tuple[int, ...] = ()
        if fl is None or ml is None:
            fl = ml = None
        else:
            values = tuple(sorted({*a.labels.values, *b.labels.values}))
            fl, ml = (_renumbered(x, s.labels.values, values) for x, s in ((fl, a), (ml, b)))
        points = (fp, mp) if fp is not None and mp is not None and fp.shape == mp.shape else None
        return Pair(m, f, ml, fl, values, points=points, name=f"{moving.name} -> {fixed.name}")


@dataclass(frozen=True, eq=False)
class _Scan:
    image: Tensor
    labels: LabelMap | None
    points: Tensor | None


def _scan(tensors: dict[str, Tensor], spacing: float, device: torch.device) -> _Scan:
    labels = tensors.get("labels")
    kept = None if labels is None else label_map(labels[0, 0].to(device), spacing)
    points = tensors.get("points")
    return _Scan(tensors["image"].to(device).float(), kept, None if points is None else points.to(device))


def _placed(labels: LabelMap, device: torch.device) -> LabelMap:
    return replace(labels, index=labels.index.to(device))


def _two(maps: Sequence[Case], draw: Draw, two: bool) -> tuple[Case, Case | None]:
    """One label map, or two of different subjects where there are two."""
    first = maps[draw.integer(0, len(maps) - 1)]
    others = [case for case in maps if case.subject != first.subject] if two else []
    return first, others[draw.integer(0, len(others) - 1)] if others else None


def _moved(matrix: Tensor, positions: Tensor) -> Tensor:
    m = matrix.to(positions)
    return torch.einsum("ij,njdhw->nidhw", m[:3, :3], positions) + m[:3, 3].view(1, 3, 1, 1, 1)


def _moved_points(matrix: Tensor, points: Tensor) -> Tensor:
    m = matrix.to(points)
    return points @ m[:3, :3].T + m[:3, 3]


def _renumbered(index: Tensor, own: Sequence[int], values: Sequence[int]) -> Tensor:
    table = torch.tensor([values.index(v) for v in own], dtype=torch.int16, device=index.device)
    return table[index.long()]


def seed_of(seed: int, kind: str, position: int) -> int:
    """A seed of its own for every position; neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{position}".encode()).digest()[:8], "big") >> 1


def all_pairs(cases: Sequence[Case]) -> tuple[tuple[int, int], ...]:
    """(moving, fixed) positions of all ordered pairs of different subjects."""
    return tuple((m, f) for m, a in enumerate(cases) for f, b in enumerate(cases) if a.subject != b.subject)
