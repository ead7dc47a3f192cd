"""How a label map looks as a scan: random or T1-like contrasts, and the faults of real scanners.

Torch only, on the device of the label map; all choices come from the pair's :class:`~.synthetic.Draw`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..fields import gaussian, resize

if TYPE_CHECKING:
    from .synthetic import Draw, Synthesis

#: FreeSurfer numbers of the right side -> those of the left: both sides of a body have one contrast.
_LEFT = {
    41: 2,
    42: 3,
    43: 4,
    44: 5,
    46: 7,
    47: 8,
    49: 10,
    50: 11,
    51: 12,
    52: 13,
    53: 17,
    54: 18,
    58: 26,
    60: 28,
    62: 30,
    63: 31,
    57: 25,
    137: 136,
    164: 163,
}
#: How bright tissues are in a T1-weighted scan, 0 to 1, by FreeSurfer number of the left side.
_T1 = {
    0: 0.0,
    2: 0.88,
    7: 0.85,
    16: 0.80,
    28: 0.78,
    13: 0.78,
    10: 0.70,
    12: 0.64,
    11: 0.58,
    26: 0.58,
    17: 0.54,
    18: 0.54,
    3: 0.52,
    8: 0.52,
    25: 0.45,
    30: 0.30,
    31: 0.35,
    4: 0.14,
    5: 0.14,
    14: 0.14,
    15: 0.14,
    24: 0.16,
    72: 0.14,
    85: 0.75,
    136: 0.5,
    163: 0.5,
}


def random_contrast(values: Sequence[int], synthesis: Synthesis, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every label's brightness, two (K,) tensors; background is mostly black."""
    anatomy = {2, 3, 41, 42} <= set(values)
    t1 = anatomy and draw.chance(synthesis.t1)
    drawn: dict[int, tuple[float, float]] = {}
    for value in sorted(_LEFT.get(v, v) if anatomy else v for v in values):
        if value in drawn:
            continue
        mean = draw.uniform(0.05, 1.0)
        if t1 and value in _T1:
            mean = min(max(_T1[value] + draw.uniform(-0.06, 0.06), 0.0), 1.0)
        drawn[value] = mean, draw.uniform(0.0, 0.06)
    drawn[0] = (0.0, 0.0) if draw.chance(0.85) else (draw.uniform(0, 0.15), draw.uniform(0, 0.02))
    rows = [drawn[_LEFT.get(v, v) if anatomy else v] for v in values]
    return tuple(torch.tensor(column, device=draw.device) for column in zip(*rows))


def render(labels: Tensor, contrast: tuple[Tensor, Tensor], synthesis: Synthesis, draw: Draw) -> Tensor:
    """A scan of a label map: texture, blur, bias field, gamma, thick slices, noise, a cut field of view; [0, 1].

    Args:
        labels: (1, 1, D, H, W) positions in the contrast's tables.
        contrast: from :func:`random_contrast`.
    """
    shape = labels.shape[2:]
    at = labels.long()
    image = contrast[0][at] + contrast[1][at] * draw.normal(1, 1, *shape)
    image = gaussian(image, [draw.uniform(0.3, max(0.3, synthesis.blur)) for _ in range(3)])
    bias = resize(draw.normal(1, 1, *(draw.integer(2, 4) for _ in range(3))), shape)
    image = image.clamp_min(0) * torch.exp(draw.uniform(0, synthesis.bias) * bias)
    image = image.clamp_min(1e-4) ** math.exp(draw.uniform(-0.35, 0.35))
    image = _thick_slices(image, synthesis.thick, draw)
    image = image + draw.uniform(0, synthesis.noise) * draw.normal(1, 1, *shape)
    if draw.chance(synthesis.cut):
        axis, depth = draw.integer(0, 2), draw.uniform(0.05, 0.25)
        gone = round(depth * shape[axis])
        image.narrow(axis + 2, 0 if draw.chance(0.5) else shape[axis] - gone, gone).zero_()
    return normalised(image)


def _thick_slices(image: Tensor, thick: float, draw: Draw) -> Tensor:
    """Averaged along one axis and brought back: an anisotropic scan on the working grid."""
    if thick <= 1 or draw.chance(0.5):
        return image
    axis, factor = draw.integer(0, 2), draw.uniform(1, thick)
    shape = list(image.shape[2:])
    coarse = [max(4, round(n / factor)) if k == axis else n for k, n in enumerate(shape)]
    smooth = gaussian(image, [0.5 * math.sqrt(factor**2 - 1) if k == axis else 0.0 for k in range(3)])
    return resize(resize(smooth, coarse), shape)


def normalised(image: Tensor) -> Tensor:
    """What ``preprocess.prepare`` does with a scan, in torch: a robust range of all voxels mapped to
    [0, 1], clipped."""
    values = image.reshape(-1)
    values = values[:: max(1, values.numel() // 60_000)].sort().values
    low, high = _robust(values)
    clipped = values.clamp(low, high)
    counts = torch.histc(clipped, 128, low, high)
    width = (high - low) / 128
    middles = low + width * (torch.arange(128, device=image.device) + 0.5)
    weight, mean = counts.cumsum(0), (counts * middles).cumsum(0)
    between = (mean[-1] * weight - mean * weight[-1]) ** 2 / (weight * (weight[-1] - weight))
    threshold = float(middles[int(torch.nan_to_num(between, 0.0, 0.0, 0.0).argmax())])
    content = values[values > low + 0.5 * (threshold - low)]
    bottom, top = _robust(content) if content.numel() > 8 else (low, high)
    bottom = min(bottom, low)
    return ((image - bottom) / max(top - bottom, 1e-6)).clamp(0, 1)


def _robust(ordered: Tensor) -> tuple[float, float]:
    """``volumes.robust_range`` of sorted values."""
    low = float(ordered[int(0.005 * (len(ordered) - 1))])
    bright = ordered[ordered > low]
    high = float(bright[int(0.995 * (len(bright) - 1))]) if len(bright) else low
    return (low, high) if high > low else (float(ordered[0]), float(ordered[-1]) + 1e-6)
