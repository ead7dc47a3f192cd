"""What one training step minimises, and how well a network does on held-out pairs.

The published loss comes from the method; what is added here needs labels, true maps or landmarks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import identity, inverse_consistency, jacobian_determinant, sample_at, warp
from ..losses import diffusion, negative_jacobian
from ..networks._base import SymmetricNetwork
from ..quality.metrics import similarity
from .options import Weighting
from .samples import Sample
from .synthetic import Pair

#: Labels compared in one step, drawn at random; all of a whole head would take too much memory.
LABELS_A_STEP = 12


def step_terms(
    network: SymmetricNetwork, drawn: Sample, level: int, weights: Weighting, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The weighted terms of one pair by name; their sum is minimised. One dictionary for each pass through the network,
    so that the caller can go backward before the next pass takes memory.

    Args:
        level: finest level in use, 1 = coarsest.
        seed: which labels are compared.
    """
    pair = drawn.pair
    published = drawn.published and weights.published > 0
    if published:
        terms = network.objective(pair.moving, pair.fixed, level)
        yield {name: weights.published * value for name, value in terms.items()}
    if drawn.supervised or not published:
        own = network.supervised_terms_of(pair, level)
        if own is not None:
            yield own
            return
        maps, own = network.supervised_mappings(pair.moving, pair.fixed, level)
        yield {**supervised_terms(maps, pair, weights, seed, 2 if level < network.levels else 1), **own}


def supervised_terms(
    maps: Sequence[tuple[Tensor | None, Tensor | None]], pair: Pair, weights: Weighting, seed: int, factor: int = 1
) -> dict[str, Tensor]:
    """Labels, true map and landmarks against a network's maps (see ``SymmetricNetwork.mappings``).

    Args:
        factor: labels are compared on blocks of so many voxels; coarse levels need no more.
    """
    terms: dict[str, list[Tensor]] = {"dice": [], "end_point": [], "landmarks": [], "smooth_field": [], "fold": []}
    chosen = _chosen(pair, seed) if weights.dice else []
    if chosen:
        hot = [_indicators(labels, chosen, factor) for labels in (pair.moving_labels, pair.fixed_labels)]
    for to_moving, to_fixed in maps:
        to_moving, to_fixed = (u if u is None else u.float() for u in (to_moving, to_fixed))
        for u in (to_moving, to_fixed):
            if u is not None:
                terms["smooth_field"].append(weights.smooth * diffusion(u))
                if weights.fold:
                    terms["fold"].append(weights.fold * negative_jacobian(u))
        if chosen:
            sides = [_pulled(h, u, factor) for h, u in zip(hot, (to_moving, to_fixed))]
            terms["dice"].append(weights.dice * soft_dice_loss(*sides))
        if weights.end_point and pair.fixed_to_moving is not None:
            terms["end_point"].append(weights.end_point * end_point(to_moving, to_fixed, pair))
        if weights.landmarks and pair.points is not None and None in (to_moving, to_fixed):
            terms["landmarks"].append(weights.landmarks * landmark_distance(to_moving, to_fixed, pair.points))
    return {name: sum(parts) / len(parts) for name, parts in terms.items() if parts}


def _chosen(pair: Pair, seed: int) -> list[int]:
    """Up to ``LABELS_A_STEP`` foreground labels that both scans show."""
    if pair.moving_labels is None or pair.fixed_labels is None:
        return []
    counts = [
        torch.bincount(labels.reshape(-1).long(), minlength=len(pair.values))
        for labels in (pair.moving_labels, pair.fixed_labels)
    ]
    shown = ((counts[0] > 0) & (counts[1] > 0)).nonzero().flatten().tolist()
    shown = [k for k in shown if pair.values[k] != 0]
    return sorted(random.Random(seed).sample(shown, min(LABELS_A_STEP, len(shown))))


def _indicators(labels: Tensor, chosen: Sequence[int], factor: int) -> Tensor:
    """(1, K, d, h, w) float: 1 where a label is, averaged over blocks."""
    hot = torch.cat([labels == k for k in chosen], 1).float()
    return F.avg_pool3d(hot, factor) if factor > 1 else hot


def _pulled(hot: Tensor, u: Tensor | None, factor: int) -> Tensor:
    if u is None:
        return hot
    return warp(hot, F.avg_pool3d(u, factor) / factor if factor > 1 else u, padding="zeros")


def soft_dice_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean over labels of 2 |ab| / (|a|^2 + |b|^2), (1, K, D, H, W) indicators in [0, 1]."""
    common = (a * b).flatten(2).sum(2)
    sizes = (a * a + b * b).flatten(2).sum(2)
    return 1 - (2 * common / sizes.clamp_min(1e-6)).mean()


def end_point(to_moving: Tensor | None, to_fixed: Tensor | None, pair: Pair) -> Tensor:
    """Mean distance in voxels between where a point goes and where it belongs, over the content that both scans show.

    From each point p of the maps' grid: the fixed point is p + to_fixed(p), its true partner lies at fixed_to_moving of
    it, and the network's at p + to_moving(p). Without ``to_moving`` the grid is the moving scan's, and the true map
    back judges ``to_fixed`` directly, so that no map has to be inverted.
    """
    if to_moving is None:
        error, seen = to_fixed - pair.moving_to_fixed, _content(pair.moving, pair.moving_to_fixed)
    elif to_fixed is None:
        error, seen = to_moving - pair.fixed_to_moving, _content(pair.fixed, pair.fixed_to_moving)
    else:
        true = to_fixed + warp(pair.fixed_to_moving, to_fixed)
        error = to_moving - true
        seen = warp(_content(pair.fixed, pair.fixed_to_moving), to_fixed.detach(), padding="zeros")
    return (_length(error) * seen).sum() / seen.sum().clamp_min(1)


def _content(image: Tensor, true: Tensor) -> Tensor:
    """(1, 1, D, H, W) in {0, 1}: where a scan shows something whose partner lies inside the other scan."""
    target = identity(image.shape[2:], image.device) + true
    inside = torch.ones_like(image, dtype=torch.bool)
    for axis, n in enumerate(image.shape[2:]):
        inside &= ((target[:, axis] >= 0) & (target[:, axis] <= n - 1))[:, None]
    return ((image > 0.05) & inside).float()


def landmark_distance(to_moving: Tensor | None, to_fixed: Tensor | None, points: tuple[Tensor, Tensor]) -> Tensor:
    """Mean distance in voxels of mapped landmarks from their partners, for a map of one direction."""
    (start, goal), u = ((points[0], points[1]), to_moving) if to_fixed is None else ((points[1], points[0]), to_fixed)
    return (start.to(u) + sample_at(u, start) - goal.to(u)).square().sum(-1).add(1e-8).sqrt().mean()


def _length(u: Tensor) -> Tensor:
    return (u.square().sum(1, keepdim=True) + 1e-8).sqrt()


# ---------------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class ValidationScores:
    """Means over the validation pairs; ``None`` = no pair knows it.

    Attributes:
        dice, dice_before: overlap of labels, and of the untouched scans.
        end_point, end_point_before: voxels.
        landmarks, landmarks_before: voxels.
        similarity, similarity_before: local correlation of pairs that look alike.
        folded: share of folded voxels.
        inverse: mean inverse consistency error, voxels.
    """

    dice: float | None
    dice_before: float | None
    end_point: float | None
    end_point_before: float | None
    landmarks: float | None
    landmarks_before: float | None
    similarity: float | None
    similarity_before: float | None
    folded: float
    inverse: float

    @property
    def score(self) -> float:
        """Larger is better: overlap where labels exist, with the end-point error as the finer hand; else similarity."""
        base = self.dice if self.dice is not None else self.similarity or 0.0
        return base - 0.01 * (self.end_point or 0.0) - 0.01 * (self.landmarks or 0.0) - self.folded


@torch.no_grad()
def validate(network: SymmetricNetwork, pairs: Sequence[Pair]) -> ValidationScores:
    """Run a network on held-out pairs; it must be in evaluation mode."""
    rows: dict[str, list[float]] = {name: [] for name in ValidationScores.__dataclass_fields__}
    for pair in pairs:
        found = network(pair.moving, pair.fixed).pair
        u = found.fixed_to_moving.float()
        rows["folded"].append(float((jacobian_determinant(u) <= 0).float().mean()))
        rows["inverse"].append(float(inverse_consistency(u, found.moving_to_fixed.float()).mean()))
        still = torch.zeros_like(u)
        for suffix, field in (("", u), ("_before", still)):
            if pair.moving_labels is not None:
                rows["dice" + suffix].append(hard_dice(pair, field))
            if pair.fixed_to_moving is not None:
                rows["end_point" + suffix].append(float(end_point(field, None, pair)))
            if pair.points is not None:
                rows["landmarks" + suffix].append(float(landmark_distance(field, None, pair.points)))
            if pair.one_contrast:
                rows["similarity" + suffix].append(similarity(pair.fixed, warp(pair.moving, field)))
    return ValidationScores(**{name: sum(v) / len(v) if v else None for name, v in rows.items()})


def hard_dice(pair: Pair, u: Tensor) -> float:
    """Mean Dice of the labels that both scans show, moving labels pulled by nearest neighbour."""
    moved = warp(pair.moving_labels.float(), u, "nearest", "zeros").long().flatten()
    fixed = pair.fixed_labels.long().flatten()
    count = len(pair.values)
    shown = torch.bincount(pair.moving_labels.long().flatten(), minlength=count)
    a, b = (torch.bincount(x, minlength=count) for x in (moved, fixed))
    common = torch.bincount(fixed[moved == fixed], minlength=count)
    kept = (shown > 0) & (b > 0) & (torch.tensor(pair.values, device=b.device) != 0)
    if not kept.any():
        return 0.0
    return float((2 * common[kept] / (a + b)[kept]).mean())
