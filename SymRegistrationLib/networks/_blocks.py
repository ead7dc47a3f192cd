"""Building blocks that at least two methods use."""

from __future__ import annotations

from torch import Tensor


def space_to_depth(image: Tensor) -> Tensor:
    """(N, C, D, H, W) -> (N, 8 C, D/2, H/2, W/2): every 2 x 2 x 2 block becomes channels; even axes only."""
    n, c, d, h, w = image.shape
    blocks = image.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, 8 * c, d // 2, h // 2, w // 2)
