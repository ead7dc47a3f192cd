"""Field mathematics: the words in which every method speaks.

Torch only. One convention throughout (mathematics.md, 1.3): a displacement field ``u`` is (N, 3, D, H, W), channels
in array-axis order, in voxels of its own grid, and pulls back: ``phi(x) = x + u(x)`` lives on the output grid and
points into the input image. Voxel centres are integers; sampling is linear with ``align_corners=True``; outside its
grid a field keeps its border value. All functions leave their arguments alone, work on CPU and CUDA, on batches, in
float32 and float64, and are differentiable unless they say otherwise. Inverses: ``inversion``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FieldPair:
    """Both directions of one registration on the common working grid; no method returns only one.

    Attributes:
        fixed_to_moving: (N, 3, D, H, W) voxels, pull-back, maps fixed points to moving points: warps the moving image.
        moving_to_fixed: the same the other way: warps the fixed image.
        inverse_method: how the second came to be: ``svf``, ``dinet``, ``fixed_point`` or ``symmetric``.
        residual: largest norm of ``compose(fixed_to_moving, moving_to_fixed)`` in voxels, measured; a tensor () while
            it waits on the device to be read.
    """

    fixed_to_moving: Tensor
    moving_to_fixed: Tensor
    inverse_method: str
    residual: float | Tensor
    details: dict = field(default_factory=dict)

    def swapped(self) -> FieldPair:
        """The pair of the exchanged registration."""
        return FieldPair(self.moving_to_fixed, self.fixed_to_moving, self.inverse_method, self.residual, self.details)


def settled(answer: Tensor) -> bool:
    """Whether a loop may end before its last round; ``answer`` is a tensor () of truth values.

    It is asked on a CPU only. On other devices the host would wait for every answer; there all rounds run, and whoever
    loops must see to it that rounds behind the end change nothing.
    """
    return answer.device.type == "cpu" and bool(answer)


# ---------------------------------------------------------------------------------------------- sampling


def check_field(u: Tensor, name: str = "field") -> None:
    """Raises ValueError: ``u`` is not (N, 3, D, H, W)."""
    if u.dim() != 5 or u.shape[1] != 3:
        raise ValueError(f"{name} must be (N, 3, D, H, W) in voxels, got {tuple(u.shape)}")


@lru_cache(maxsize=32)
def _axis(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, n, device=device, dtype=dtype) if n > 1 else torch.zeros(1, device=device, dtype=dtype)


def identity(shape: Sequence[int], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, 3, D, H, W): every voxel's own index, in array-axis order."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _sampling_grid(u: Tensor, size: Sequence[int]) -> Tensor:
    """Displacement to grid_sample's (N, D, H, W, 3) coordinates (x, y, z = W, H, D) of an image of ``size``."""
    shape = u.shape[2:]
    grid = u.new_empty((u.shape[0], *shape, 3)) if not u.requires_grad else None
    parts = []
    for axis in range(3):
        scale = 2.0 / max(size[axis] - 1, 1)
        if size[axis] == shape[axis]:
            base = _axis(shape[axis], u.device, u.dtype)
        else:
            base = torch.arange(shape[axis], device=u.device, dtype=u.dtype) * scale - 1
        base = base.view([-1 if k == axis else 1 for k in range(3)])
        if grid is None:
            parts.append(u[:, axis] * scale + base)
        else:
            torch.add(base, u[:, axis], alpha=scale, out=grid[..., 2 - axis])
    return grid if grid is not None else torch.stack(parts[::-1], dim=-1)


def sample(image: Tensor, grid: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """``grid_sample`` with align_corners=True that also uses all CPU cores for a batch of one.

    PyTorch's CPU kernel runs in parallel over the batch only, so one volume is split along an output axis.
    """
    n, depth = grid.shape[0], grid.shape[1]
    chunks = torch.get_num_threads() if image.device.type == "cpu" and n == 1 else 1
    if chunks <= 1 or depth < chunks:
        return F.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=True)
    if rest := depth % chunks:
        parts = (
            sample(image, grid[:, : depth - rest], mode, padding),
            sample(image, grid[:, depth - rest :], mode, padding),
        )
        return torch.cat(parts, 2)
    slabs = grid.reshape(chunks, depth // chunks, *grid.shape[2:])
    out = F.grid_sample(
        image.expand(chunks, *image.shape[1:]), slabs, mode=mode, padding_mode=padding, align_corners=True
    )
    return out.transpose(0, 1).reshape(1, image.shape[1], *grid.shape[1:4])


def sample_at(image: Tensor, points: Tensor) -> Tensor:
    """Values of (N, C, D, H, W) ``image`` at (N, P, 3) voxel positions in array-axis order, linear,
    border value outside.

    Returns:
        (N, P, C); differentiable in both arguments.
    """
    size = torch.tensor([max(n - 1, 1) for n in image.shape[2:]], device=image.device, dtype=image.dtype)
    grid = (2 * points.to(image) / size - 1).flip(-1)[:, :, None, None]
    return sample(image, grid)[..., 0, 0].transpose(1, 2)


def warp(image: Tensor, u: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Pull ``image`` back through ``phi = id + u``: ``out(x) = image(x + u(x))``.

    Args:
        image: (N, C, D', H', W'), may have another size than the field; index 0 of both coincide.
        u: (N, 3, D, H, W) voxels.
        mode: ``bilinear`` (that is, trilinear) or ``nearest`` (for labels).
        padding: ``border`` or ``zeros``.

    Returns:
        (N, C, D, H, W).

    Raises:
        ValueError: ``u`` is not a field, or the batch sizes differ.
    """
    check_field(u)
    if image.dim() != 5 or image.shape[0] not in (1, u.shape[0]):
        raise ValueError(f"image must be (N, C, D, H, W) with N = 1 or {u.shape[0]}, got {tuple(image.shape)}")
    image = image.expand(u.shape[0], -1, -1, -1, -1)
    return sample(image, _sampling_grid(u.to(image.dtype), image.shape[2:]), mode, padding)


def compose(first: Tensor, then: Tensor) -> Tensor:
    """Displacement of ``phi_first o phi_then``: warping by it equals warping by ``first``, then by ``then``.

    ``u(x) = then(x) + first(x + then(x))``. Both (N, 3, D, H, W), voxels of one grid. Differentiable.
    """
    return then + warp(first, then)


def compose_step(first: Tensor, step: Tensor) -> Tensor:
    """:func:`compose` for steps of at most a voxel, in a third of its time on a CPU; not differentiable.

    Along each axis ``first`` is linear between a voxel and the next, as there, but the three changes are added instead
    of multiplied out: what differs is of the size of the product of two components of the step.
    """
    out = first + step
    for axis in range(3):
        dim, n = axis + 2, first.shape[axis + 2] - 1
        slope, along = torch.diff(first, dim=dim), step[:, axis : axis + 1]
        out.narrow(dim, 0, n).addcmul_(slope, along.narrow(dim, 0, n).clamp(min=0))
        out.narrow(dim, 1, n).addcmul_(slope, along.narrow(dim, 1, n).clamp(max=0))
    return out


def exponentiate(v: Tensor, steps: int = 7) -> Tensor:
    """exp(v) of a stationary velocity field by scaling and squaring; the inverse map is ``exponentiate(-v)``.

    Args:
        v: (N, 3, D, H, W), voxels per unit time.
        steps: number of squarings T (all four methods' bases use 7).
    """
    check_field(v, "velocity")
    u = v / 2**steps
    for _ in range(steps):
        u = compose(u, u)
    return u


@torch.no_grad()
def logarithm(u: Tensor, iterations: int = 12, steps: int = 6, tolerance: float = 0.005) -> Tensor:
    """A stationary velocity v with exp(v) = id + u, as nearly as there is one; not differentiable.

    Fixed-point steps ``v <- v + (exp(-v) o phi - id)`` (the first-order Baker-Campbell-Hausdorff update of Bossa
    et al., "Contributions to 3D diffeomorphic atlas estimation", MICCAI 2007). They only need compositions, so a
    field that folds or that no stationary flow reaches gives its nearest velocity instead of failing; the best one
    seen is returned.

    Args:
        u: (N, 3, D, H, W) voxels.
        iterations: at most so many steps.
        steps: squarings of each exponential.
        tolerance: stop when the mean residual is below, voxels.
    """
    check_field(u)
    v, best, least = u, u, float("inf")
    for _ in range(iterations + 1):
        rest = compose(exponentiate(-v, steps), u)
        size = float(square_sum(rest).sqrt().mean())
        if not size < least:
            break
        best, least = v, size
        if size < tolerance:
            break
        v = v + rest
    return best


def inverse_consistency(forward: Tensor, inverse: Tensor) -> Tensor:
    """(N, 1, D, H, W): |forward o inverse - id| in voxels at every voxel of the inverse's grid."""
    return square_sum(compose(forward, inverse)).sqrt()


def square_sum(u: Tensor) -> Tensor:
    """(N, 1, D, H, W): squared length of every vector; an explicit sum, since ``norm(dim=1)`` is slow on CPU."""
    d, h, w = u.unbind(1)
    return torch.addcmul(torch.addcmul(d * d, h, h), w, w)[:, None]


# ---------------------------------------------------------------------------------------------- resizing


def resize(image: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, C, *) -> (N, C, *shape), trilinear, corner voxels onto corner voxels."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    return F.interpolate(image, size=tuple(shape), mode="trilinear", align_corners=True)


def resize_field(u: Tensor, shape: Sequence[int]) -> Tensor:
    """A voxel field on another lattice over the same corners: values scale with (new - 1) / (old - 1) per axis."""
    factors = [(n - 1) / max(o - 1, 1) if o > 1 else 1.0 for n, o in zip(shape, u.shape[2:])]
    return scale_channels(resize(u, shape), factors)


def scale_channels(u: Tensor, factors: Sequence[float]) -> Tensor:
    """Each of the three channels times its own factor."""
    return u * torch.tensor(list(factors), dtype=u.dtype, device=u.device).view(1, 3, 1, 1, 1)


# ---------------------------------------------------------------------------------------------- derivatives


def gradient(image: Tensor, axis: int) -> Tensor:
    """Central difference along array axis 0, 1 or 2 (per voxel), one-sided at the borders; same shape."""
    dim, n = axis + 2, image.shape[axis + 2]
    if n == 1:
        return torch.zeros_like(image)
    if image.requires_grad:
        inner = 0.5 * (image.narrow(dim, 2, n - 2) - image.narrow(dim, 0, n - 2))
        ends = [image.narrow(dim, k + 1, 1) - image.narrow(dim, k, 1) for k in (0, n - 2)]
        return torch.cat([ends[0], inner, ends[1]], dim)
    out = torch.empty_like(image)
    if n > 2:
        torch.sub(image.narrow(dim, 2, n - 2), image.narrow(dim, 0, n - 2), out=out.narrow(dim, 1, n - 2)).mul_(0.5)
    out.select(dim, 0).copy_(image.select(dim, 1) - image.select(dim, 0))
    out.select(dim, n - 1).copy_(image.select(dim, n - 1) - image.select(dim, n - 2))
    return out


def jacobian_determinant(u: Tensor, matrix: Tensor | None = None) -> Tensor:
    """det(I + grad u) at every voxel, central differences; (N, 1, D, H, W).

    Args:
        u: (N, 3, D, H, W) voxels. For a field in mm between two grids use ``matrix``.
        matrix: (3, 3); when given, ``u`` holds displacement vectors in mm and ``matrix`` maps an index step to mm
            (columns = array axes); the determinant is then that of the physical map.
    """
    check_field(u)
    rows = [[gradient(u[:, r : r + 1], axis) for axis in range(3)] for r in range(3)]
    if matrix is not None:
        inverse = torch.linalg.inv(matrix.double()).tolist()
        rows = [[sum(row[a] * inverse[a][b] for a in range(3)) for b in range(3)] for row in rows]
    for k in range(3):
        rows[k][k] = rows[k][k] + 1
    return determinant(rows)


def determinant(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Determinants of the 3 x 3 matrices whose entries are nine tensors of one shape."""
    (a, b, c), (d, e, f), (g, h, i) = rows
    first, second, third = (
        torch.addcmul(p * q, r, s, value=-1) for p, q, r, s in ((e, i, f, h), (d, i, f, g), (d, h, e, g))
    )
    return torch.addcmul(torch.addcmul(a * first, b, second, value=-1), c, third)


def sd_log_jacobian(determinant: Tensor, mask: Tensor | None = None) -> float:
    """Standard deviation of log det over the mask, det clipped at 1e-9 (mathematics.md, 2.4)."""
    values = determinant[mask] if mask is not None else determinant
    return float(values.clamp(min=1e-9).log().std(unbiased=False))


# ---------------------------------------------------------------------------------------------- filters


#: Filters that reach further, voxels, are matrix products; narrower ones are sums of shifted images.
_NARROW = 8
#: So many voxels are filtered at once: more of them no longer stay near the processor from one sum to the next.
_AT_ONCE = 1_000_000


def _reach(kind: str, width: float) -> int:
    """How far a filter looks, voxels."""
    return int(width) // 2 if kind == "box" else int(max(2.0, 4 * width))


@lru_cache(maxsize=64)
def _band(kind: str, width: float, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, n) matrix that filters one axis: ``box`` of ``width`` voxels (plain sum / width, zeros
    outside), or ``gauss``."""
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().double()
    matrix = (distance <= _reach(kind, width)).double()
    if kind == "box":
        matrix = matrix / width
    else:
        matrix = torch.exp(-0.5 * (distance / width) ** 2) * matrix
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix.to(device=device, dtype=dtype)


def no_autocast(image: Tensor) -> contextlib.AbstractContextManager:
    """A context without half precision, on devices that have any."""
    kind = image.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def ambient_autocast(image: Tensor) -> contextlib.AbstractContextManager:
    """A context with the half precision that is on now, to come back to within :func:`no_autocast`."""
    kind = image.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def _filter(image: Tensor, kind: str, widths: Sequence[float]) -> Tensor:
    """Separable filter, one axis after the other."""
    with no_autocast(image):  # half precision would round what is filtered
        axes = [axis for axis in (4, 3, 2) if widths[axis - 2] > 0]
        narrow = all(_reach(kind, widths[axis - 2]) <= min(_NARROW, (image.shape[axis] - 1) // 2) for axis in axes)
        exact = image.dtype in (torch.float32, torch.float64)
        if image.device.type == "cpu" and narrow and exact and not image.requires_grad:
            return _by_shifts(image, kind, [(axis, float(widths[axis - 2])) for axis in axes])
        for axis in axes:
            band = _band(kind, float(widths[axis - 2]), image.shape[axis], image.device, image.dtype)
            if axis == 4:
                image = torch.matmul(image, band.T)
            elif axis == 3:
                image = torch.matmul(band, image)
            else:
                image = torch.matmul(band, image.flatten(3)).view_as(image)
        return image


def _by_shifts(image: Tensor, kind: str, widths: Sequence[tuple[int, float]]) -> Tensor:
    """The filter as sums of shifted images, a few channels at a time: on a CPU three to five times faster than by
    matrices.

    Args:
        widths: (axis, width) of what is filtered.
    """
    out = torch.empty(image.shape, dtype=image.dtype)
    count = max(1, _AT_ONCE // image[0, 0].numel())
    for source, target in zip(image.flatten(0, 1).split(count), out.flatten(0, 1).split(count)):
        for k, (axis, width) in enumerate(widths):
            last = k == len(widths) - 1
            source = _along(source, axis - 1, kind, width, target if last else torch.empty_like(target))
    return out if widths else image


def _along(rows: Tensor, axis: int, kind: str, width: float, out: Tensor) -> Tensor:
    """``rows`` filtered along one axis, into ``out``."""
    n, (weights, shares) = rows.shape[axis], _taps(kind, width)
    torch.mul(rows, weights[0], out=out)
    for k, weight in enumerate(weights[1:], 1):
        out.narrow(axis, 0, n - k).add_(rows.narrow(axis, k, n - k), alpha=weight)
        out.narrow(axis, k, n - k).add_(rows.narrow(axis, 0, n - k), alpha=weight)
    if shares is not None:
        ends = shares.to(rows.dtype).view([-1 if k == axis else 1 for k in range(4)])
        out.narrow(axis, 0, len(shares)).mul_(ends)
        out.narrow(axis, n - len(shares), len(shares)).mul_(ends.flip(axis))
    return out


@lru_cache(maxsize=64)
def _taps(kind: str, width: float) -> tuple[list[float], Tensor | None]:
    """Weights of a filter from its middle outwards; and what the values next to a border are multiplied by, so that
    weights which fall outside are shared out among those inside, None for ``box``."""
    reach = _reach(kind, width)
    middle = _band(kind, width, 2 * reach + 1, torch.device("cpu"), torch.float64)[reach, reach:]
    inside = middle.cumsum(0)[:-1] + middle[1:].sum()
    return middle.tolist(), None if kind == "box" else 1 / inside


def box_mean(image: Tensor, window: int) -> Tensor:
    """Mean over a cube of ``window`` (odd) voxels, zeros counted outside; (N, C, D, H, W)."""
    return _filter(image, "box", (window,) * 3)


def gaussian(image: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Gaussian smoothing, ``sigma`` in voxels (one or per axis), weights renormalised at the borders."""
    return _filter(image, "gauss", (sigma,) * 3 if isinstance(sigma, (int, float)) else sigma)


def downsample2(image: Tensor, times: int = 1) -> Tensor:
    """Average pooling k3 s2 p1 without counting the padding, as LapIRN and HSyN shrink images."""
    for _ in range(times):
        image = F.avg_pool3d(image, 3, stride=2, padding=1, count_include_pad=False)
    return image
