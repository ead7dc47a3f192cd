"""Building blocks that at least two methods use, and the Haar transform."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..fields import no_autocast


def space_to_depth(image: Tensor) -> Tensor:
    """(N, C, D, H, W) -> (N, 8 C, D/2, H/2, W/2): every 2 x 2 x 2 block becomes channels; even axes only."""
    n, c, d, h, w = image.shape
    blocks = image.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, 8 * c, d // 2, h // 2, w // 2)


#: Rows: the orthonormal Haar filters of a 2 x 2 x 2 block, low-pass first; columns in :func:`space_to_depth`'s order.
HAAR = torch.tensor([[(-1.0) ** bin(row & column).count("1") for column in range(8)] for row in range(8)]) / 8**0.5


def haar(image: Tensor) -> Tensor:
    """(N, 1, D, H, W) -> (N, 8, D/2, H/2, W/2): low-pass band, then seven detail bands; keeps the energy."""
    with no_autocast(image):
        return torch.einsum("ij,njdhw->nidhw", HAAR.to(image.device), space_to_depth(image).float())


def energy_map(image: Tensor) -> Tensor:
    """(N, 1, D/2, H/2, W/2): squared Haar details summed, divided by their 99.5 % quantile, cut to [0, 1]."""
    energy = haar(image)[:, 1:].square().sum(1, keepdim=True)
    flat = energy.flatten(1)
    flat = flat[:, :: max(flat.shape[1] // 200_000, 1)]
    top = flat.kthvalue(max(round(0.995 * flat.shape[1]), 1), dim=1).values.clamp_min(1e-6)
    return (energy / top.view(-1, 1, 1, 1, 1)).clamp(max=1.0)


class Conv3d(nn.Conv3d):
    """``nn.Conv3d``, also fast on one small volume on a CPU.

    For a single sample of at most ``_SMALL`` numbers (without the last axis) PyTorch leaves oneDNN for a loop that is
    seven to ten times slower; as a batch of two, one of them thrown away, it takes a quarter of that time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and len(x) == 1 and self.kernel_size != (1, 1, 1) and x.shape[1:4].numel() <= _SMALL:
            return super().forward(x.expand(2, -1, -1, -1, -1))[:1]
        return super().forward(x)


#: PyTorch's threshold, `use_mkldnn` in ATen/native/Convolution.cpp.
_SMALL = 20480


def in_full_precision(head: nn.Module, x: Tensor) -> Tensor:
    """A displacement head in float32 also under autocast: half precision would round 30 voxels to 0.1."""
    with no_autocast(x):
        return head(x.float())


def zero_init(conv: nn.Conv3d, std: float = 1e-5) -> nn.Conv3d:
    """Give a displacement head weights N(0, ``std``) and bias 0, so that an untrained network is near the identity."""
    nn.init.normal_(conv.weight, 0.0, std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def steady_init(module: nn.Module) -> None:
    """Give convolutions weights that keep the size of what flows through them (He et al. 2015, LeakyReLU 0.2).

    PyTorch's own choice shrinks it to a third per layer: behind ten layers without normalisation a head sees next to
    nothing, and training stands still. Call before heads get their own values.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, 0.2)
        elif isinstance(part, nn.ConvTranspose3d):  # kernel = stride: every output voxel is reached once
            nn.init.normal_(part.weight, 0.0, part.in_channels**-0.5)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
