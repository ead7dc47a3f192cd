"""How far a result can be trusted, voxel by voxel: perturbed runs, and the cheap predictors that one run leaves.

The same registration is repeated with what should not matter changed: scans exchanged, axes flipped, brightness curve
and noise, the sampling lattice shifted by part of a voxel (*jitter*), and, every other time, with the method made
*stiffer*. The stiffer runs are what finds errors: where images show little, every run of equal stiffness invents the
same deformation, so plain repetition agrees there (measured on known warps: rank correlation of the spread with the
true error 0.1 to 0.2 with jitter alone, 0.4 to 0.7 with stiffness).

Directions count: the **covariance of displacement vectors** is collected in one pass, never the
spread of vector lengths, for which two opposite fields agree. What the map is worth in mm is the
business of :mod:`SymRegistrationLib.uncertainty.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, compose, exponentiate, gaussian, gradient, identity, logarithm, square_sum, warp
from ..losses import local_moments
from ..networks._base import measured_pair
from ..registration.optimisers.syn import TYPICAL_TO_LONGEST
from ..registration.working_grid import WorkingPair

#: Stiffer runs smooth the whole field by this factor of the preset's sigma, lowest and highest.
STIFFEST = (1.2, 2.5)
#: The predictors of one voxel that a calibration may weigh, with perturbed runs and without; all in voxels of the
#: working grid.
PREDICTORS = ("jitter", "stiff", "stiff_low_contrast", "bend_low_contrast")
FAST_PREDICTORS = ("bend", "bend_low_contrast", "relax", "relax_low_contrast")
#: Largest shift that no contrast at all leaves unnoticed, voxels per direction; sets where ``contrast`` levels off.
NOTHING_SEEN = 1.0
#: Sigma in voxels of the surroundings over which a predictor counts where nothing is seen.
SURROUNDINGS = {"stiff": 1.0, "bend": 2.0, "relax": 1.0}
#: Steps of :func:`relaxation_predictor` and the sigma in voxels by which each smooths the whole field: twice that of
#: the optimiser.
RELAXING_STEPS, RELAXING_SIGMA = 4, 1.5
#: Root mean square of the force below which it is not scaled up: real scans have 0.02 to 0.03, two equal ones 0.0001
#: of rounding.
LEAST_FORCE = 2e-3


@dataclass(frozen=True)
class Perturbation:
    """One change that should not matter.

    Attributes:
        swap: exchange fixed and moving.
        flips: which array axes are mirrored.
        gammas: exponents of the brightness of fixed and moving.
        noise: standard deviation of added noise, intensities in [0, 1].
        shift: of the sampling lattice, voxels along D, H, W, each within half a voxel.
        seed: of the noise.
        stiffness: factor on the smoothing of the whole field; above 1 nothing else is changed.
    """

    swap: bool
    flips: tuple[bool, bool, bool]
    gammas: tuple[float, float]
    noise: float
    shift: tuple[float, float, float]
    seed: int
    stiffness: float = 1.0

    def intensities(self, space: WorkingPair) -> WorkingPair:
        """The working pair with brightness and noise changed; geometry untouched."""
        if not self.noise and self.gammas == (1.0, 1.0):
            return space
        generator = torch.Generator().manual_seed(self.seed)

        def changed(image: Tensor, gamma: float) -> Tensor:
            noise = torch.randn(image.shape, generator=generator).to(image)
            return (image.pow(gamma) + self.noise * noise * (image > 0.02)).clamp(0, 1)

        return replace(space, fixed=changed(space.fixed, self.gammas[0]), moving=changed(space.moving, self.gammas[1]))

    def geometry(self, space: WorkingPair) -> WorkingPair:
        """The working pair exchanged, mirrored and re-sampled on the shifted lattice."""

        def changed(image: Tensor | None) -> Tensor | None:
            if image is None:
                return None
            if any(self.shift):
                image = warp(image, self._constant(image, 1.0).expand(len(image), -1, -1, -1, -1))
            return image.flip(self._axes())

        fixed, moving = changed(space.fixed), changed(space.moving)
        weight, regions = changed(space.weight), changed(space.regions)
        if self.swap:
            fixed, moving = moving, fixed
            weight, regions = (None if each is None else each.flip(0) for each in (weight, regions))
        return replace(space, fixed=fixed, moving=moving, weight=weight, regions=regions)

    def undone(self, pair: FieldPair) -> FieldPair:
        """A result of the perturbed geometry, in the original frame."""

        def back(u: Tensor) -> Tensor:
            signs = torch.tensor([-1.0 if flip else 1.0 for flip in self.flips]).to(u).view(1, 3, 1, 1, 1)
            u = u.flip(self._axes()) * signs
            return warp(u, self._constant(u, -1.0)) if any(self.shift) else u

        pair = pair.swapped() if self.swap else pair
        return replace(pair, fixed_to_moving=back(pair.fixed_to_moving), moving_to_fixed=back(pair.moving_to_fixed))

    def _axes(self) -> list[int]:
        return [axis + 2 for axis in range(3) if self.flips[axis]]

    def _constant(self, like: Tensor, sign: float) -> Tensor:
        shift = sign * torch.tensor(self.shift).to(like)
        return shift.view(1, 3, 1, 1, 1).expand(1, 3, *like.shape[2:]).contiguous()


def perturbations(count: int, seed: int) -> list[Perturbation]:
    """``count`` different ones, the same for the same seed: by turns a stiffer method, and jitter with
    and without exchange.

    Stiffness walks over its range by the golden ratio, so that any number of runs covers it evenly.
    """
    random = np.random.default_rng(seed + 7919)
    low, high = np.log(STIFFEST)
    found = []
    for k in range(count):
        flips = random.integers(0, 2, 3)
        jitter = Perturbation(
            swap=k % 4 == 1,
            flips=(bool(flips[0]), bool(flips[1]), bool(flips[2])),
            gammas=tuple(np.exp(random.uniform(-0.2, 0.2, 2))),
            noise=float(random.uniform(0.01, 0.03)),
            shift=tuple(random.uniform(-0.5, 0.5, 3)),
            seed=int(random.integers(2**31)),
        )
        share = (0.7 + 0.618034 * (k // 2)) % 1
        stiffer = Perturbation(
            False, (False,) * 3, (1.0, 1.0), 0.0, (0.0,) * 3, 0, float(np.exp(low + share * (high - low)))
        )
        found.append(jitter if k % 2 else stiffer)
    return found


class VectorSpread:
    """Running mean and covariance of displacement vectors (Welford), without keeping the fields."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, u: Tensor) -> None:
        """Take in one field (3, D, H, W)."""
        if self.mean is None:
            self.mean, self.products = torch.zeros_like(u), u.new_zeros(3, 3, *u.shape[1:])
        self.count += 1
        before = u - self.mean
        self.mean = self.mean + before / self.count
        self.products = self.products + before[:, None] * (u - self.mean)[None]

    def covariance(self) -> Tensor:
        """(3, 3, D, H, W), unbiased, squared units of the fields. Raises ValueError below two fields."""
        if self.count < 2:
            raise ValueError("a spread needs at least 2 fields")
        return self.products / (self.count - 1)

    def length(self, matrix: np.ndarray | None = None) -> Tensor:
        """(D, H, W): square root of the trace after ``matrix`` (3, 3), which takes field units to mm."""
        metric = np.eye(3) if matrix is None else matrix.T @ matrix
        return (
            torch.einsum("abdhw,ab->dhw", self.covariance(), torch.from_numpy(metric).to(self.mean)).clamp_min(0).sqrt()
        )

    def largest_axis(self, matrix: np.ndarray | None = None) -> Tensor:
        """(D, H, W): standard deviation along the direction in which the vectors differ most, after
        ``matrix`` (3, 3)."""
        linear = torch.from_numpy(np.eye(3) if matrix is None else np.asarray(matrix, float)).to(self.mean)
        covariance = linear @ self.covariance().permute(2, 3, 4, 0, 1) @ linear.T
        return torch.linalg.eigvalsh(covariance)[..., -1].clamp_min(0).sqrt()


class Runs:
    """What perturbed runs say about one delivered result, taken in one by one without keeping fields.

    Attributes:
        spread: of the delivered result and all runs.
        offsets: per kind of run (``jitter``, ``stiff``, ``methods``) the mean squared distance from the delivered
            result, (D, H, W) squared voxels, and the number of runs. Around the delivered result, not around their
            mean: a result that all runs agree to be wrong must not look certain.
    """

    def __init__(self, delivered: Tensor) -> None:
        self.delivered = delivered
        self.spread = VectorSpread()
        self.spread.add(delivered)
        self.offsets: dict[str, tuple[Tensor, int]] = {}

    def add(self, u: Tensor, kind: str) -> None:
        """Take in one run's field (3, D, H, W) of a ``kind``."""
        self.spread.add(u)
        squared = square_sum((u - self.delivered)[None])[0, 0]
        mean, count = self.offsets.get(kind, (torch.zeros_like(squared), 0))
        self.offsets[kind] = mean + (squared - mean) / (count + 1), count + 1

    def predictors(self) -> dict[str, Tensor]:
        """Per kind the root mean square distance from the delivered result, (D, H, W) voxels."""
        return {kind: mean.sqrt() for kind, (mean, _) in self.offsets.items()}


class LogMean:
    """Mean of diffeomorphisms in the log domain: velocities are averaged, so that the mean is one too (Arsigny et al.,
    "A log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006). A plain mean of displacements may fold.
    """

    def __init__(self) -> None:
        self.count = 0
        self.velocity: Tensor | None = None

    def add(self, pair: FieldPair) -> None:
        """Take in one result; both directions speak, so exchanging the scans exchanges the mean."""
        velocity = (logarithm(pair.fixed_to_moving) - logarithm(pair.moving_to_fixed)) / 2
        self.count += 1
        before = torch.zeros_like(velocity) if self.velocity is None else self.velocity
        self.velocity = before + (velocity - before) / self.count

    def pair(self) -> FieldPair:
        """The mean, both directions. Raises ValueError when nothing was added."""
        if self.velocity is None:
            raise ValueError("a mean needs at least one result")
        pair = measured_pair(exponentiate(self.velocity), exponentiate(-self.velocity), "svf")
        return replace(pair, residual=float(pair.residual))


# ---------------------------------------------------------------------------------------------- predictors of a single
# run


def contrast_predictor(fixed: Tensor, warped: Tensor, window: int = 7, sigma: float = 1.5) -> Tensor:
    """(D, H, W) voxels: how far a point could move unnoticed, given the contrast around it and what noise is left.

    The Cramer-Rao bound of a local match: with the structure tensor J of both images (both directions of a symmetric
    result) and the residual variance r of their local linear fit, the covariance of a shift is ``(J / r + 1 /
    t^2)^-1``; its root trace goes to ``t sqrt(3)``, t = :data:`NOTHING_SEEN`, where there is nothing to see. Gain,
    offset and sign of the contrast do not count.
    """
    _, _, var_a, var_b, cov = local_moments(fixed, warped, window)
    residual = gaussian(2 * ((var_a * var_b).sqrt() - cov.abs()).clamp_min(0) + 1e-5, sigma)
    gain = (var_a + 1e-5).sqrt() / (var_b + 1e-5).sqrt()
    slopes = [[gradient(image, axis) for axis in range(3)] for image in (fixed, warped)]

    def entry(i: int, j: int) -> Tensor:
        product = (slopes[0][i] * slopes[0][j] / gain + slopes[1][i] * slopes[1][j] * gain) / 2
        return gaussian(product, sigma) / residual + (i == j) / NOTHING_SEEN**2

    a, b, c, d, e, f = entry(0, 0), entry(1, 1), entry(2, 2), entry(0, 1), entry(0, 2), entry(1, 2)
    minors = (a * b - d * d) + (a * c - e * e) + (b * c - f * f)
    determinant = a * (b * c - f * f) - d * (d * c - f * e) + e * (d * f - b * e)
    return (minors / determinant.clamp_min(1e-12)).clamp(0, 3 * NOTHING_SEEN**2).sqrt()[0, 0]


def bending_predictor(u: Tensor, contrast: Tensor, sigma: float = 4.0) -> Tensor:
    """(D, H, W) voxels: how far a vector deviates from its surroundings, those that saw contrast counting more.

    A stand-in for the stiffer run that was not made.

    Args:
        u: (1, 3, D, H, W) voxels.
        contrast: (D, H, W), from :func:`contrast_predictor`.
    """
    weight = contrast.clamp_min(0.02 * NOTHING_SEEN).pow(-2)[None, None]
    u = u - _affine_part(u)  # an uneven weight would take a plain turn for a bend
    return square_sum(u - gaussian(u * weight, sigma) / gaussian(weight, sigma)).sqrt()[0, 0]


def relaxation_predictor(fixed: Tensor, moving: Tensor, u: Tensor, seen: Tensor | None = None) -> Tensor:
    """(D, H, W) voxels: how far a point moves in a few steps of a stiffer optimiser that starts from the result.

    Where contrast holds the field it stays, elsewhere it slips: the cheapest stand-in for a stiffer run. The
    force is the local correlation's, without the adjoint of its windows (Avants et al. 2008); only the map on the
    fixed grid moves.

    Args:
        fixed, moving: (1, 1, D, H, W).
        u: (1, 3, D, H, W) voxels, fixed to moving.
        seen: (1, 1, D, H, W), where there is a force; ``None`` = everywhere.
    """
    held = u
    for _ in range(RELAXING_STEPS):
        warped = warp(moving, u)
        mean_a, mean_b, var_a, var_b, cov = local_moments(fixed, warped, 5)
        force = cov / (var_a * var_b + 1e-5) * (fixed - mean_a - cov / (var_b + 1e-5) * (warped - mean_b))
        if seen is not None:
            force = force * seen
        step = gaussian(force * torch.cat([gradient(warped, axis) for axis in range(3)], 1), 1.2)
        length = square_sum(step).sqrt()
        scale = 0.6 / (TYPICAL_TO_LONGEST * length.square().mean().sqrt().clamp_min(LEAST_FORCE))
        u = gaussian(compose(u, step * (scale / (length * scale).clamp_min(1.0))), RELAXING_SIGMA)
    return square_sum(u - held).sqrt()[0, 0]


def with_low_contrast(predictors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add ``stiff_low_contrast``, ``bend_low_contrast`` and ``relax_low_contrast``: the root mean square of the
    predictor around a voxel, times the share (0 to 1) of its place that the contrast leaves open. Lack of contrast
    alone says little; where the field is restless it says much.
    """
    share = predictors["contrast"] / (3**0.5 * NOTHING_SEEN)
    more = {
        f"{name}_low_contrast": gaussian(predictors[name].square()[None, None], sigma)[0, 0].clamp_min(0).sqrt() * share
        for name, sigma in SURROUNDINGS.items()
        if name in predictors
    }
    return {**predictors, **more}


def _affine_part(u: Tensor) -> Tensor:
    """(1, 3, D, H, W): the affine field nearest to ``u``, by least squares on a sparse lattice."""
    here = identity(u.shape[2:], u.device, u.dtype)
    columns = torch.cat([here, torch.ones_like(here[:, :1])], 1)[0]
    few = (slice(None), *(slice(None, None, max(1, n // 16)) for n in u.shape[2:]))
    found = torch.linalg.lstsq(columns[few].reshape(4, -1).T.double(), u[0][few].reshape(3, -1).T.double()).solution
    return torch.einsum("ij,idhw->jdhw", found.to(u), columns)[None]


def single_run_predictors(space: WorkingPair, pair: FieldPair) -> dict[str, Tensor]:
    """``contrast``, ``bend`` and ``relax`` of one result, (D, H, W) voxels each."""
    u, seen = pair.fixed_to_moving, None
    contrast = contrast_predictor(space.fixed, warp(space.moving, u))
    if space.weight is not None:  # what a mask hides is not seen
        seen = space.weight[:1] * warp(space.weight[1:], u, padding="zeros")
        contrast = torch.where(seen[0, 0] > 0.5, contrast, contrast.new_tensor(3**0.5 * NOTHING_SEEN))
    return {
        "contrast": contrast,
        "bend": bending_predictor(u, contrast),
        "relax": relaxation_predictor(space.fixed, space.moving, u, seen),
    }
