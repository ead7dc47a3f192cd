"""Initial alignment: where the two scans lie to each other before anything bends.

The result is two 4x4 matrices from a **mid-space** to each scan, ``exp(-X/2)`` and ``exp(+X/2)`` of one
generator X, so that exchanging the scans exchanges the matrices (mathematics.md, 5.1).
Scores are computed at points of the mid-space, which favours neither scan.

The search is global: a few hundred rotations are scored on a coarse level, for the best of them every shift is tried at
once by Fourier correlation, the best candidates are refined together, the winner is refined on finer levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from ..fields import sample
from ..geometry.file_checks import quiet
from ..geometry.grid import transform_points
from ..job import InputError, existing_file
from ..losses import mutual_information
from .working_grid import Scan, shrink

#: Below this the best pose is hardly better than the next one found elsewhere.
UNSURE = 0.2
#: Candidates closer than this to the winner belong to its basin (degrees, and share of the content's radius).
BASIN_DEGREES, BASIN_SHARE = 20.0, 0.2


@dataclass(frozen=True, eq=False)
class Alignment:
    """Result of the initial alignment.

    Attributes:
        mid_to_fixed, mid_to_moving: (4, 4), LPS mm, mid-space point -> scan point.
        kind: ``none``, ``centre``, ``rigid``, ``affine`` or ``file``.
        similarity: correlation (or mutual information) at the optimum.
        confidence: 0..1, how much better this pose is than the best one found elsewhere; 1 when nothing was searched.
        measure: ``ncc`` or ``mi``.
    """

    mid_to_fixed: np.ndarray
    mid_to_moving: np.ndarray
    kind: str
    similarity: float = float("nan")
    confidence: float = 1.0
    measure: str = "ncc"

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4) LPS mm, fixed point -> moving point."""
        return self.mid_to_moving @ np.linalg.inv(self.mid_to_fixed)

    @property
    def unsure(self) -> bool:
        """True when another pose explains the scans nearly as well."""
        return self.confidence < UNSURE


def align(
    fixed: Scan,
    moving: Scan,
    kind: str = "affine",
    measure: str = "auto",
    seed: int = 0,
    landmarks: tuple[np.ndarray, np.ndarray] | None = None,
) -> Alignment:
    """Find the pose of two prepared scans.

    Args:
        kind: ``none`` (headers are right), ``centre`` (content middles onto each other), ``rigid``, ``affine``, or the
            path of a linear ITK transform file, fixed -> moving.
        measure: ``ncc`` (one contrast), ``mi`` (any), or ``auto``: ncc, then mi when ncc ends low.
        seed: of the rotations tried; the search is deterministic given it.
        landmarks: ((n, 3), (n, 3)) LPS mm of fixed and moving: start there instead of searching.

    Raises:
        InputError: unreadable or non-linear transform file; fewer than 3 landmarks.
    """
    if kind == "none":
        return Alignment(np.eye(4), np.eye(4), "none")
    if kind not in ("centre", "rigid", "affine"):
        return split_midway(read_linear(kind), fixed.centroid, "file")
    if kind == "centre":
        half = (moving.centroid - fixed.centroid) / 2
        return Alignment(_shift(-half), _shift(half), "centre")
    if landmarks is not None:
        start = from_landmarks(*landmarks, affine=False)
        return _Search(fixed, moving, "ncc", seed, start).run(kind)
    found = _Search(fixed, moving, "mi" if measure == "mi" else "ncc", seed).run(kind)
    if measure == "auto" and found.similarity < 0.6:
        other = _Search(fixed, moving, "mi", seed).run(kind)
        if other.confidence >= found.confidence:
            found = other
    return found


def from_landmarks(fixed: np.ndarray, moving: np.ndarray, affine: bool) -> np.ndarray:
    """(4, 4) LPS mm, fixed -> moving, least squares over corresponding points; rigid by Kabsch or full affine.

    Raises:
        InputError: fewer than 3 points (4 for affine), or counts differ.
    """
    fixed, moving = np.asarray(fixed, float), np.asarray(moving, float)
    need = 4 if affine else 3
    if len(fixed) != len(moving) or len(fixed) < need:
        raise InputError(
            f"{len(fixed)} fixed and {len(moving)} moving landmarks were given.",
            f"Give the same number on both sides, at least {need}.",
        )
    cf, cm = fixed.mean(0), moving.mean(0)
    if affine:
        linear = np.linalg.lstsq(fixed - cf, moving - cm, rcond=None)[0].T
    else:
        u, _, vt = np.linalg.svd((moving - cm).T @ (fixed - cf))
        linear = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, cm - linear @ cf
    return matrix


def read_linear(path: str) -> np.ndarray:
    """(4, 4) LPS mm of a linear ITK transform file (.tfm, .txt, .mat, .h5), fixed -> moving.

    Raises:
        InputError: missing, unreadable, or not linear.
    """
    try:
        with quiet():
            transform = sitk.ReadTransform(str(existing_file(path, "initial transform")))
    except RuntimeError:
        raise InputError(
            f"initial transform '{path}' could not be read.",
            "Give none, centre, rigid, affine, or an ITK transform file (.h5, .tfm, .mat, .txt).",
        ) from None
    if transform.GetDimension() != 3:
        raise InputError(f"initial transform '{path}' is {transform.GetDimension()}-D.", "Give one for 3-D scans.")
    if not transform.IsLinear():
        raise InputError(
            f"initial transform '{path}' is not linear ({transform.GetName()}).",
            "Only rigid and affine transforms can start a registration.",
        )
    columns = np.array([transform.TransformPoint(p) for p in ((0.0, 0, 0), (1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 1))])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (columns[1:] - columns[0]).T, columns[0]
    if not 1e-6 < abs(np.linalg.det(matrix[:3, :3])) < 1e6 or not np.isfinite(matrix).all():
        raise InputError(f"initial transform '{path}' is singular.", "It flattens or explodes space; export it again.")
    return matrix


def split_midway(matrix: np.ndarray, centre: np.ndarray, kind: str) -> Alignment:
    """Split fixed -> moving into two equal halves about ``centre``."""
    target = transform_points(matrix, centre)
    local = _shift(-target) @ matrix @ _shift(centre)
    values, vectors = np.linalg.eig(local)
    root = (vectors @ np.diag(np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)).real
    if not np.allclose(root @ root, local, atol=1e-6):
        root, rest = np.eye(4), local
    else:
        rest = root
    return Alignment(_shift(centre) @ np.linalg.inv(root), _shift(target) @ rest, kind)


def _shift(vector: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


# ---------------------------------------------------------------------------------------------- the search


def _axis_turns() -> np.ndarray:
    """(23, 3) rotation vectors that take coordinate axes onto each other: swapped and flipped axes of exports."""
    vectors = [np.eye(3)[k] * turn * np.pi / 2 for k in range(3) for turn in (-1, 1, 2)]
    for signs in np.ndindex(2, 2):
        corner = np.array([1, *(1 - 2 * np.array(signs))]) / np.sqrt(3)
        vectors += [corner * 2 * np.pi / 3, -corner * 2 * np.pi / 3]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for sign in (-1, 1):
            vectors.append((np.eye(3)[a] + sign * np.eye(3)[b]) / np.sqrt(2) * np.pi)
    return np.array(vectors)


_AXIS_TURNS = _axis_turns()


class _Level:
    """Both scans at one spacing, ready to be sampled at mid-space points."""

    def __init__(self, fixed: Scan, moving: Scan, spacing: float, radius: float, device: torch.device):
        self.spacing = spacing
        self.scans = [shrink(fixed, spacing), shrink(moving, spacing)]
        steps = torch.arange(-radius, radius + spacing / 2, spacing, dtype=torch.float32, device=device)
        points = torch.cartesian_prod(steps, steps, steps)
        points = points[points.square().sum(1) <= (1.05 * radius) ** 2]
        self.points = points[: len(points) // 2 * 2]
        self.to_grid, self.images = [], []
        for scan in self.scans:
            size = torch.tensor(scan.image.shape[2:], dtype=torch.float64)
            inverse = torch.from_numpy(scan.grid.inverse)
            scale = 2 / (size - 1).clamp_min(1)
            matrix = torch.eye(4, dtype=torch.float64)
            matrix[:3] = scale[:, None] * inverse[:3]
            matrix[:3, 3] -= 1
            self.to_grid.append(matrix[[2, 1, 0, 3]].to(device))
            valid = torch.ones_like(scan.image) if scan.mask is None else scan.mask
            self.images.append(
                torch.cat([scan.image * valid, valid], 1) if scan.cut or scan.mask is not None else scan.image
            )

    def sampled(self, which: int, matrices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Intensity and validity (K, n) of scan ``which`` at the points mapped by (K, 4, 4) mid -> scan mm."""
        matrices = (self.to_grid[which] @ matrices.double()).float()
        grid = self.points @ matrices[:, :3, :3].transpose(1, 2) + matrices[:, None, :3, 3]
        image = self.images[which]
        grid = grid[:, :, None, None, :]
        values = sample(image.expand(len(grid), -1, -1, -1, -1), grid, padding="zeros")[..., 0, 0]
        return values[:, 0], values[:, 1] if image.shape[1] == 2 else None

    def score(self, to_fixed: Tensor, to_moving: Tensor, measure: str) -> Tensor:
        """(K,) similarity of K poses; differentiable."""
        a, va = self.sampled(0, to_fixed)
        b, vb = self.sampled(1, to_moving)
        weight = va if vb is None else vb if va is None else va * vb
        overlap = None
        if weight is not None:
            possible = (
                min(
                    float(image.shape[2] * image.shape[3] * image.shape[4]) * float(np.prod(scan.grid.spacing))
                    for image, scan in zip(self.images, self.scans)
                )
                / self.spacing**3
            )
            # Without gradient: overlap ranks poses, but must not pull them together.
            overlap = (weight.detach().sum(1) / (0.6 * min(possible, len(self.points)))).clamp(max=1)
            # Intensities of partly valid samples were multiplied by their validity on the way in.
            a, b = a / va.clamp_min(0.5) if va is not None else a, b / vb.clamp_min(0.5) if vb is not None else b
        if measure == "mi":
            values = [
                -mutual_information(
                    x[None, None, None, None],
                    y[None, None, None, None],
                    24,
                    None if weight is None else w[None, None, None, None],
                )
                for x, y, w in zip(a, b, weight if weight is not None else a)
            ]
            value = torch.stack(values)
        else:
            value = _correlation(a, b, weight)
        return value if overlap is None else value * overlap


def _correlation(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """(K,) Pearson correlation along the last axis, weighted."""
    if weight is None:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-6)
    total = weight.sum(1, keepdim=True).clamp_min(1e-3)
    a, b = a - (weight * a).sum(1, keepdim=True) / total, b - (weight * b).sum(1, keepdim=True) / total
    return (weight * a * b).sum(1) / ((weight * a * a).sum(1) * (weight * b * b).sum(1)).sqrt().clamp_min(1e-6)


class _Search:
    """One global search; holds the levels and the two content middles."""

    ROTATIONS, SHIFTED, REFINED = 480, 24, 8

    def __init__(self, fixed: Scan, moving: Scan, measure: str, seed: int, start: np.ndarray | None = None):
        self.scans, self.measure, self.seed, self.start = (fixed, moving), measure, seed, start
        self.device = fixed.image.device
        self.centres = [torch.from_numpy(_shift(s.centroid)).to(self.device) for s in self.scans]
        distances = [np.linalg.norm(s.inside - s.centroid, axis=1) for s in self.scans]
        self.spreads = [float(np.sqrt((d**2).mean())) for d in distances]
        self.radius = float(max(np.percentile(d, 98) for d in distances)) * 1.05
        self.levels: dict[float, _Level] = {}

    def level(self, share: float) -> _Level:
        """The level whose spacing is ``radius / share`` mm."""
        if share not in self.levels:
            self.levels[share] = _Level(*self.scans, self.radius / share, self.radius, self.device)
        return self.levels[share]

    def run(self, kind: str) -> Alignment:
        """Search, refine, judge."""
        if self.start is None:
            candidates = self._candidates(scaled=kind == "affine")
            group = "similarity" if kind == "affine" else "rigid"
            candidates, scores = self._refine(candidates, group, self.level(12), 30, 0.04)
            winner = int(scores.argmax())
            confidence = self._confidence(candidates, scores, winner)
            best = candidates[winner : winner + 1]
        else:
            best, confidence = self._generator(self.start)[None], 1.0
        best, scores = self._refine(best, kind, self.level(24), 40 if kind == "affine" else 25, 0.012)
        if kind == "affine":
            best, scores = self._refine(best, kind, self.level(32), 12, 0.003)
        to_fixed, to_moving = (m[0].cpu().numpy() for m in self._poses(best))
        return Alignment(to_fixed, to_moving, kind, float(scores[0]), confidence, self.measure)

    def _generator(self, matrix: np.ndarray) -> Tensor:
        """The X whose exponential is ``matrix`` (rigid, LPS mm, fixed -> moving) seen between the two content
        middles."""
        between = np.linalg.inv(self.centres[1].cpu().numpy()) @ matrix @ self.centres[0].cpu().numpy()
        x = np.zeros((4, 4))
        angle = np.arccos(np.clip((np.trace(between[:3, :3]) - 1) / 2, -1, 1))
        if angle > 1e-6:
            skew = between[:3, :3] - between[:3, :3].T
            x[:3, :3] = skew * angle / (2 * np.sin(angle)) if angle < np.pi - 1e-3 else 0
        g = torch.from_numpy(x)
        # exp([[G, v], [0, 0]]) has translation V v with V = integral of exp(sG).
        steps = torch.linspace(0, 1, 65, dtype=torch.float64)
        v = torch.trapezoid(torch.matrix_exp(steps[:, None, None] * g[:3, :3]), steps, dim=0)
        g[:3, 3] = torch.linalg.solve(v, torch.from_numpy(between[:3, 3]))
        return g.to(self.device)

    def _poses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Generators (K, 4, 4) -> mid -> fixed and mid -> moving, (K, 4, 4) float64 mm."""
        half = torch.matrix_exp(x.double() / 2)
        back = torch.matrix_exp(-x.double() / 2)
        return self.centres[0] @ back, self.centres[1] @ half

    def _candidates(self, scaled: bool) -> Tensor:
        """(REFINED, 4, 4) generators: all rotations scored at matched centres, then all shifts for the best of them.

        With ``scaled``, every rotation is also tried at the ratio of the two contents' sizes.
        """
        rotations = self._rotations()
        growth = float(np.clip(np.log(self.spreads[1] / self.spreads[0]), -0.4, 0.4))
        if scaled and abs(growth) > 0.04:
            grown = rotations.clone()
            grown[:, :3, :3] += growth * torch.eye(3, dtype=grown.dtype, device=grown.device)
            rotations = torch.cat([rotations, grown])
        level = self.level(8)
        with torch.no_grad():
            scores = torch.cat(
                [
                    level.score(*self._poses(part), "ncc" if self.measure == "ncc" else "mi")
                    for part in rotations.split(160)
                ]
            )
            scores[0] = scores[0] + 0.02  # prefer the header's pose among equals
            chosen = rotations[self._apart(rotations, scores, self.SHIFTED, 25.0)]
            shifted = torch.cat([chosen, self._best_shifts(chosen)])
            scores = level.score(*self._poses(shifted), self.measure)
            return shifted[self._apart(shifted, scores, self.REFINED, 15.0)]

    def _apart(self, x: Tensor, scores: Tensor, count: int, degrees: float) -> list[int]:
        """Indices of the best ``count`` poses of which no two are near each other, so that every basin gets its
        chance."""
        poses = torch.matrix_exp(x.double()).cpu()
        kept: list[int] = []
        for k in scores.argsort(descending=True).tolist():
            angles, shifts = _distances(poses[kept], poses[k])
            if not bool(((angles < degrees) & (shifts < BASIN_SHARE * self.radius)).any()):
                kept.append(k)
            if len(kept) == count:
                break
        return kept

    def _rotations(self) -> Tensor:
        """Generators of even rotations, closed under inversion so that exchanging the scans tries the same poses."""
        random = np.random.default_rng(self.seed)
        q = random.normal(size=(self.ROTATIONS // 2, 4))
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        q[q[:, 0] < 0] *= -1
        angle = 2 * np.arccos(np.clip(q[:, :1], -1, 1))
        vectors = q[:, 1:] / np.linalg.norm(q[:, 1:], axis=1, keepdims=True) * angle
        vectors = np.concatenate([np.zeros((1, 3)), vectors, -vectors, _AXIS_TURNS])
        x = torch.zeros(len(vectors), 4, 4, dtype=torch.float64)
        x[:, :3, :3] = _skew(torch.from_numpy(vectors))
        return x.to(self.device)

    def _best_shifts(self, rotations: Tensor) -> Tensor:
        """For each rotation, the shift at which the two scans correlate best, every shift tried by FFT."""
        level = self.level(8)
        n = 2 * int(np.ceil(self.radius / level.spacing)) + 1
        steps = (torch.arange(n, device=self.device) - n // 2).float() * level.spacing
        cube = torch.cartesian_prod(steps, steps, steps)
        keep, level.points = level.points, cube
        to_fixed, to_moving = self._poses(rotations)
        cubes = [level.sampled(k, m)[0].view(-1, n, n, n) for k, m in enumerate((to_fixed, to_moving))]
        level.points = keep
        size = (2 * n,) * 3
        spectra = [torch.fft.rfftn(c - c.mean((1, 2, 3), keepdim=True), s=size, dim=(1, 2, 3)) for c in cubes]
        correlation = torch.fft.irfftn(spectra[0] * spectra[1].conj(), s=size, dim=(1, 2, 3))
        flat = correlation.flatten(1).argmax(1)
        shift = torch.stack([flat // (4 * n * n), flat // (2 * n) % (2 * n), flat % (2 * n)], 1)
        shift = torch.where(shift > n, shift - 2 * n, shift).double() * level.spacing
        # correlation peaks where fixed(p + s) meets moving(p): in mid-space the pair must part by -s, half on each
        # side.
        matrices = torch.matrix_exp(rotations)
        out = rotations.clone()
        for k in range(len(out)):
            half = torch.matrix_exp(rotations[k] / 2)[:3, :3]
            whole = matrices[k].clone()
            whole[:3, 3] = -half @ shift[k]
            out[k, :3, 3] = torch.linalg.solve(_left_jacobian(rotations[k][:3, :3]), whole[:3, 3])
        return out

    def _refine(self, x: Tensor, kind: str, level: _Level, iterations: int, rate: float) -> tuple[Tensor, Tensor]:
        """Adam on the generators of all candidates at once; ``rate`` in radians, shifts scaled by the radius."""
        x = x.clone()
        x[:, :3, 3] /= self.radius
        x.requires_grad_(True)
        adam = _Adam(x)
        best, best_scores = x.detach().clone(), torch.full((len(x),), -2.0, device=self.device)
        for step in range(iterations + 1):
            unit = x * x.new_tensor([1, 1, 1, self.radius])
            scores = level.score(*self._poses(unit), self.measure)
            better = scores.detach() > best_scores
            best[better], best_scores[better] = x.detach()[better], scores.detach()[better]
            if step == iterations:
                break
            (slope,) = torch.autograd.grad(-scores.sum(), x)
            _project(slope, kind)
            with torch.no_grad():
                adam.step(slope, rate * (1 - 0.8 * step / iterations))
                _project(x, kind)
        return best * best.new_tensor([1, 1, 1, self.radius]), best_scores

    def _confidence(self, candidates: Tensor, scores: Tensor, winner: int) -> float:
        """1 - (distance of the runner-up in another basin from perfection) measured against the winner's, 0..1."""
        poses = torch.matrix_exp(candidates.double())
        angles, distances = _distances(poses, poses[winner])
        rest = scores[(angles > BASIN_DEGREES) | (distances > BASIN_SHARE * self.radius)].tolist()
        if not rest:
            return 1.0
        best, other = float(scores[winner]), max(max(rest), 0.0)
        return float(
            np.clip((best - other) / max(1 - other, 1e-3) if self.measure == "ncc" else 1 - other / best, 0, 1)
        )


class _Adam:
    """Adam (Kingma and Ba 2015) on one tensor. Torch's own loads its compiler, over a second in every new process."""

    def __init__(self, x: Tensor, betas: tuple[float, float] = (0.85, 0.98)):
        self.x, self.betas, self.steps = x, betas, 0
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, slope: Tensor, rate: float) -> None:
        """One step down the ``slope``, of the shape of x."""
        self.steps += 1
        one, two = self.betas
        self.mean.lerp_(slope, 1 - one)
        self.square.mul_(two).addcmul_(slope, slope, value=1 - two)
        size = (self.square.sqrt() / (1 - two**self.steps) ** 0.5).add_(1e-8)
        self.x.addcdiv_(self.mean, size, value=-rate / (1 - one**self.steps))


def _distances(poses: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) degrees of rotation and (K,) mm of shift between (K, 4, 4) poses and one; scale is left out."""
    turns, turn = (p[..., :3, :3] / torch.linalg.det(p[..., :3, :3])[..., None, None] ** (1 / 3) for p in (poses, pose))
    trace = (turns * turn).sum((1, 2))
    return torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1))), (poses[:, :3, 3] - pose[:3, 3]).norm(dim=1)


def _skew(v: Tensor) -> Tensor:
    """(K, 3) rotation vectors -> (K, 3, 3)."""
    zero = torch.zeros_like(v[:, 0])
    return torch.stack([zero, -v[:, 2], v[:, 1], v[:, 2], zero, -v[:, 0], -v[:, 1], v[:, 0], zero], 1).view(-1, 3, 3)


def _left_jacobian(skew: Tensor) -> Tensor:
    """V with exp([[S, v], [0, 0]]) = [[exp S, V v], [0, 1]]."""
    steps = torch.linspace(0, 1, 65, dtype=skew.dtype, device=skew.device)
    return torch.trapezoid(torch.matrix_exp(steps[:, None, None] * skew), steps, dim=0)


def _project(x: Tensor, kind: str) -> None:
    """Keep generators (or their gradients) in the chosen group: rigid = skew linear part, similarity = plus a multiple
    of I."""
    x[:, 3] = 0
    if kind in ("rigid", "similarity"):
        linear = x[:, :3, :3]
        trace = linear.diagonal(dim1=1, dim2=2).mean(1)
        x[:, :3, :3] = (linear - linear.transpose(1, 2)) / 2
        if kind == "similarity":
            x[:, :3, :3] += trace[:, None, None] * torch.eye(3, dtype=x.dtype, device=x.device)
