"""The global search behind the initial alignment: where two scans lie to each other, whatever the headers say.

Every pose is one generator X, ``exp(-X/2)`` takes a point of the mid-space to the fixed scan and ``exp(+X/2)`` to the
moving one, each about the middle of its content. Scores are taken at points of the mid-space, which favours neither
scan, so that exchanging the scans exchanges the result.

A few hundred rotations are scored on a coarse level, for the best of them every shift is tried at once by Fourier
correlation, the best candidates and the headers' own pose are refined together, the winner is refined on finer levels.
One contrast is scored by plain correlation, two by normalised mutual information and, for the shifts, by the directions
of edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..fields import box_mean
from .pose_scores import Level, edge_directions
from .working_grid import Scan, nearest_rotation

#: Candidates closer than this to the winner belong to its basin (degrees, and share of the content's radius).
BASIN_DEGREES, BASIN_SHARE = 20.0, 0.2
#: Rotations tried, rotations whose shifts are tried, candidates refined, and those of them refined to the end.
ROTATIONS, SHIFTED, REFINED, FINALISTS = 480, 24, 8, 4
#: Spacings are the content's radius over these: search, first refinement, main refinement, polish.
COARSE, MIDDLE, FINE, FINEST = 8, 12, 24, 32
#: Another pose is clearly better than the headers' when it is ahead by this share, see :func:`ahead`.
CLEARLY = 0.05
#: Two contrasts stay rigid unless a principal stretch reaches the first (natural logarithm) and the information gains
#: the third, a share. Measured: one person's T1, T2 and FLAIR, unscaled, were stretched by at most 0.016 and gained at
#: most 0.036; other persons' brains and heads were stretched by at least 0.07 and gained at least 0.06. A stretch
#: beyond the second is no anatomy of one kind.
LEAST_STRETCH, MOST_STRETCH, LEAST_GAIN = 0.03, 0.4, 0.04
#: Local likeness: brightness above which a scan shows something, and width of the window in samples.
SHOWN, WINDOW = 0.1, 7


@dataclass(frozen=True, eq=False)
class Found:
    """What a search ended at.

    Attributes:
        x: (4, 4) float64 generator, mm, between the middles of the contents.
        score: by ``measure`` on the last level.
        confidence: 0..1, how far it is ahead of the best pose elsewhere.
        tried: (K, 4, 4) generators of all that were refined, the headers' own first, and ``scores`` (K,) of them on one
            level; () when nothing was searched.
        winner: which of these was refined further.
        stretched: what an affine pose would have been and gained, where one was asked for across contrasts.
    """

    x: Tensor
    score: float
    confidence: float
    measure: str
    tried: Tensor | tuple = ()
    scores: Tensor | tuple = ()
    winner: int = 0
    stretched: Stretched | None = None


@dataclass(frozen=True)
class Stretched:
    """What freeing scale and shear would do: the largest principal stretch (natural logarithm), the share of mutual
    information gained, and whether the images insist on it."""

    stretch: float
    gain: float
    insisted: bool


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


class Search:
    """One global search; holds the levels and the two content middles.

    Args:
        fixed, moving: the prepared scans.
        seed: of the rotations tried.
    """

    def __init__(self, fixed: Scan, moving: Scan, seed: int):
        self.scans, self.seed = (fixed, moving), seed
        self.device = fixed.image.device
        self.centres = [torch.from_numpy(shift(s.centroid)).to(self.device) for s in self.scans]
        distances = [np.linalg.norm(s.inside - s.centroid, axis=1) for s in self.scans]
        self.spreads = [float(np.sqrt((d**2).mean())) for d in distances]
        self.radius = float(max(np.percentile(d, 98) for d in distances)) * 1.05
        self.levels: dict[float, Level] = {}

    def level(self, share: float) -> Level:
        """The level whose spacing is ``radius / share`` mm."""
        if share not in self.levels:
            self.levels[share] = Level(*self.scans, self.radius / share, self.radius, thinned=share >= FINE)
        return self.levels[share]

    def one_contrast(self, kind: str) -> Found:
        """Search by correlation, rough; ``affine`` searches similarities."""
        candidates = self._candidates("ncc", scaled=kind != "rigid")
        return self._tournament(candidates, "rigid" if kind == "rigid" else "similarity", "ncc")

    def polish(self, found: Found, kind: str, measure: str) -> Found:
        """One pose refined on the fine levels."""
        x, scores = self.refine(found.x[None], kind, measure, self.level(FINE), 40 if kind == "affine" else 25, 0.012)
        if kind == "affine" or measure == "mi":
            x, scores = self.refine(x, kind, measure, self.level(FINEST), 12 if kind == "affine" else 15, 0.003)
        return replace(found, x=x[0], score=float(scores[0]), measure=measure)

    def two_contrasts(self, more: Sequence[Tensor] = ()) -> Found:
        """Rigid search by normalised mutual information, polished; ``more`` generators (4, 4) are refined beside its
        own candidates."""
        candidates = torch.stack([*(rigid_part(one) for one in more), *self._candidates("mi", scaled=False)])
        return self.polish(self._tournament(candidates, "rigid", "mi"), "rigid", "mi")

    def stretched(self, rigid: Found) -> Found:
        """The affine pose from a rigid one by normalised mutual information, if the images insist on it; else the
        rigid one."""
        x, scores = self.refine(rigid.x[None], "affine", "mi", self.level(FINE), 30, 0.012)
        x, scores = self.refine(x, "affine", "mi", self.level(FINEST), 12, 0.003)
        stretch = largest_stretch(torch.matrix_exp(x[0])[:3, :3])
        gain = float(scores[0]) / max(rigid.score, 1e-6) - 1
        told = Stretched(stretch, gain, LEAST_STRETCH < stretch < MOST_STRETCH and gain >= LEAST_GAIN)
        if told.insisted:
            rigid = replace(rigid, x=x[0], score=float(scores[0]))
        return replace(rigid, stretched=told)

    def _tournament(self, x: Tensor, group: str, measure: str) -> Found:
        """Refine candidates (K, 4, 4) together with the headers' own pose. After a third of the steps only the best go
        on, no two of them in one basin. The headers win unless another is clearly better."""
        level, x = self.level(MIDDLE), torch.cat([self.generator(np.eye(4))[None], x])
        x, scores = self.refine(x, group, measure, level, 10, 0.04)
        kept = self._apart(x, scores, FINALISTS, BASIN_DEGREES)
        kept = kept if 0 in kept else [0, *kept]
        x[kept], scores[kept] = self.refine(x[kept], group, measure, level, 20, 0.03)
        winner = int(scores.argmax())
        if ahead(float(scores[winner]), float(scores[0]), measure) < CLEARLY:
            winner = 0
        return Found(
            x[winner], float(scores[winner]), self._confidence(x, scores, winner, measure), measure, x, scores, winner
        )

    def likeness(self, x: Tensor) -> float:
        """:meth:`likeness_at` of one generator (4, 4)."""
        return self.likeness_at(*self.poses(x[None]))

    def likeness_near(self, matrix: np.ndarray) -> float:
        """The best likeness at a pose that may be rough: (4, 4) LPS mm, fixed -> moving; it is refined both ways."""
        x = self.generator(matrix)[None]
        refined = [self.refine(x, "rigid", measure, self.level(MIDDLE), 20, 0.03)[0] for measure in ("ncc", "mi")]
        return max(self.likeness(one[0]) for one in (x, *refined))

    @torch.no_grad()
    def likeness_at(self, to_fixed: Tensor, to_moving: Tensor) -> float:
        """Mean signed local correlation (windows of 7 samples on the level FINE) where both scans show something:
        near 1 for one contrast, low or negative for two, whatever the silhouettes do to the global correlation."""
        level = self.level(FINE)
        cube, n = self._cube(level)
        a, b = (level.sampled(k, m, cube)[0].view(1, 1, n, n, n) for k, m in enumerate((to_fixed, to_moving)))
        inside = ((a > SHOWN) & (b > SHOWN)).float()
        share, *means = (box_mean(c, WINDOW) for c in (inside, *(v * inside for v in (a, b, a * a, b * b, a * b))))
        usable = (inside > 0) & (share > 0.5)
        if not bool(usable.any()):
            return 0.0
        ma, mb, aa, bb, ab = (m / share.clamp_min(1e-3) for m in means)
        variance = (aa - ma * ma).clamp_min(1e-5) * (bb - mb * mb).clamp_min(1e-5)
        return float(((ab - ma * mb) / variance.sqrt())[usable].mean())

    def matrix(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """One generator (4, 4) as (mid -> fixed, mid -> moving), (4, 4) LPS mm."""
        to_fixed, to_moving = self.poses(x[None])
        return to_fixed[0].cpu().numpy(), to_moving[0].cpu().numpy()

    def _cube(self, level: Level) -> tuple[Tensor, int]:
        """(n^3, 3) mm points of a cube over the contents at a level's spacing, and n."""
        n = 2 * int(np.ceil(self.radius / level.spacing)) + 1
        steps = (torch.arange(n, device=self.device) - n // 2).float() * level.spacing
        return torch.cartesian_prod(steps, steps, steps), n

    def information(self, x: Tensor) -> float:
        """Normalised mutual information of one generator (4, 4) on the level FINE."""
        with torch.no_grad():
            return float(self.level(FINE).score(*self.poses(x[None]), "mi")[0])

    def generator(self, matrix: np.ndarray) -> Tensor:
        """The X whose exponential is ``matrix`` (LPS mm, fixed -> moving; its stretch is left out) seen between the
        two content middles."""
        between = np.linalg.inv(self.centres[1].cpu().numpy()) @ matrix @ self.centres[0].cpu().numpy()
        if not np.allclose(between[:3, :3] @ between[:3, :3].T, np.eye(3), atol=1e-6):
            values, vectors = np.linalg.eig(between)
            logarithm = (vectors @ np.diag(np.log(values.astype(complex))) @ np.linalg.inv(vectors)).real
            found = torch.from_numpy(np.ascontiguousarray(logarithm))
            if np.isfinite(logarithm).all() and np.allclose(torch.matrix_exp(found).numpy(), between, atol=1e-6):
                return found.to(self.device)
            u, _, vt = np.linalg.svd(between[:3, :3])  # half a turn with a scale: only the rigid part
            between[:3, :3] = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        between[:3, :3] = nearest_rotation(between[:3, :3])
        x = np.zeros((4, 4))
        angle = np.arccos(np.clip((np.trace(between[:3, :3]) - 1) / 2, -1, 1))
        if angle > 1e-6:
            skew = between[:3, :3] - between[:3, :3].T
            x[:3, :3] = skew * angle / (2 * np.sin(angle)) if angle < np.pi - 1e-3 else 0
        g = torch.from_numpy(x)
        g[:3, 3] = torch.linalg.solve(_left_jacobian(g[:3, :3]), torch.from_numpy(between[:3, 3]))
        return g.to(self.device)

    def poses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Generators (K, 4, 4) -> mid -> fixed and mid -> moving, (K, 4, 4) float64 mm."""
        half = torch.matrix_exp(x.double() / 2)
        back = torch.matrix_exp(-x.double() / 2)
        return self.centres[0] @ back, self.centres[1] @ half

    @torch.no_grad()
    def _candidates(self, measure: str, scaled: bool) -> Tensor:
        """(REFINED, 4, 4) generators: all rotations scored at matched centres, then all shifts for the best of them.

        With ``scaled``, every rotation is also tried at the ratio of the two contents' sizes.
        """
        rotations = self._rotations()
        growth = float(np.clip(np.log(self.spreads[1] / self.spreads[0]), -0.4, 0.4))
        if scaled and abs(growth) > 0.04:
            grown = rotations.clone()
            grown[:, :3, :3] += growth * torch.eye(3, dtype=grown.dtype, device=grown.device)
            rotations = torch.cat([rotations, grown])
        level = self.level(COARSE)
        scores = torch.cat([level.score(*self.poses(part), measure) for part in rotations.split(160)])
        scores[0] = scores[0] + 0.02  # prefer the header's rotation among equals
        chosen = rotations[self._apart(rotations, scores, SHIFTED, 25.0)]
        shifted = torch.cat([chosen, self._best_shifts(chosen, measure)])
        scores = level.score(*self.poses(shifted), measure)
        return shifted[self._apart(shifted, scores, REFINED, 15.0)]

    def _apart(self, x: Tensor, scores: Tensor, count: int, degrees: float) -> list[int]:
        """Indices of the best ``count`` poses of which no two are near each other, so that every basin
        gets its chance."""
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
        q = random.normal(size=(ROTATIONS // 2, 4))
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        q[q[:, 0] < 0] *= -1
        angle = 2 * np.arccos(np.clip(q[:, :1], -1, 1))
        vectors = q[:, 1:] / np.linalg.norm(q[:, 1:], axis=1, keepdims=True) * angle
        vectors = np.concatenate([np.zeros((1, 3)), vectors, -vectors, _AXIS_TURNS])
        x = torch.zeros(len(vectors), 4, 4, dtype=torch.float64)
        x[:, :3, :3] = _skew(torch.from_numpy(vectors))
        return x.to(self.device)

    def _best_shifts(self, rotations: Tensor, measure: str) -> Tensor:
        """For each rotation, the shift at which the two scans agree best, every shift tried by FFT.

        One contrast: where brightness correlates. Two: where edges run alike.
        """
        level = self.level(COARSE)
        cube, n = self._cube(level)
        cubes = [level.sampled(k, m, cube)[0].view(-1, 1, n, n, n) for k, m in enumerate(self.poses(rotations))]
        cubes = [c - c.mean((2, 3, 4), keepdim=True) if measure == "ncc" else edge_directions(c) for c in cubes]
        size = (2 * n,) * 3
        total = torch.zeros(len(rotations), *size, device=self.device)
        for channel in range(cubes[0].shape[1]):
            spectra = [torch.fft.rfftn(c[:, channel], s=size, dim=(1, 2, 3)) for c in cubes]
            total += torch.fft.irfftn(spectra[0] * spectra[1].conj(), s=size, dim=(1, 2, 3))
        flat = total.flatten(1).argmax(1)
        at = torch.stack([flat // (4 * n * n), flat // (2 * n) % (2 * n), flat % (2 * n)], 1)
        at = torch.where(at > n, at - 2 * n, at).double() * level.spacing
        # The peak is where fixed(p + s) meets moving(p): in mid-space the pair must part by -s, half on each side.
        out = rotations.clone()
        for k in range(len(out)):
            half = torch.matrix_exp(rotations[k] / 2)[:3, :3]
            out[k, :3, 3] = torch.linalg.solve(_left_jacobian(rotations[k][:3, :3]), -half @ at[k])
        return out

    def refine(
        self, x: Tensor, kind: str, measure: str, level: Level, iterations: int, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Adam on the generators of all candidates at once; ``rate`` in radians, shifts scaled by the radius."""
        x = x.clone()
        x[:, :3, 3] /= self.radius
        x.requires_grad_(True)
        adam = Adam(x)
        best, best_scores = x.detach().clone(), torch.full((len(x),), -2.0, device=self.device)
        for step in range(iterations + 1):
            unit = x * x.new_tensor([1, 1, 1, self.radius])
            scores = level.score(*self.poses(unit), measure)
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

    def one_basin(self, one: Tensor, other: Tensor) -> bool:
        """Whether two generators (4, 4) lie in one basin."""
        angle, distance = _distances(torch.matrix_exp(one.double())[None], torch.matrix_exp(other.double()))
        return bool(angle[0] < BASIN_DEGREES and distance[0] < BASIN_SHARE * self.radius)

    def _confidence(self, candidates: Tensor, scores: Tensor, winner: int, measure: str) -> float:
        """How far the winner is ahead of the best in another basin, 0..1."""
        poses = torch.matrix_exp(candidates.double())
        angles, distances = _distances(poses, poses[winner])
        rest = scores[(angles > BASIN_DEGREES) | (distances > BASIN_SHARE * self.radius)].tolist()
        if not rest:
            return 1.0
        return float(np.clip(ahead(float(scores[winner]), max(rest), measure), 0, 1))


def ahead(best: float, other: float, measure: str) -> float:
    """By what share one score is ahead of another: of what the other misses to perfection (``ncc``), or of itself
    (``mi``)."""
    other = max(other, 0.0)
    return (best - other) / max(1 - other, 1e-3) if measure == "ncc" else 1 - other / max(best, 1e-6)


class Adam:
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


def rigid_part(x: Tensor) -> Tensor:
    """A generator without its stretch and shear."""
    x = x.clone()
    _project(x[None], "rigid")
    return x


def largest_stretch(linear: Tensor) -> float:
    """Largest absolute logarithm of a linear map's (3, 3) principal stretches."""
    return float(torch.linalg.svdvals(linear).log().abs().max())


def shift(vector: np.ndarray) -> np.ndarray:
    """(4, 4) of a translation."""
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


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
