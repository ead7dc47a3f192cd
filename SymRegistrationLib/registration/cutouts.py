"""A scan that was cut out of its surroundings, such as a brain without its skull, beside one that was not.

The outline of what was cut out is no anatomy: laid over a whole head it fits the skull better than the brain. So the
similarity looks only where the cut-out scan shows something, as if its user had given that as a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..geometry.volumes import Volume, foreground

#: A scan is cut out when these shares of its six faces, and of all that is not content, have one value. Measured: nine
#: brains without skull 1.00 and 0.90 to 0.99; heads, livers and lungs as scanned, and heads without face, at most 0.91
#: and 0.91.
LEAST_FACE, LEAST_AIR = 0.99, 0.85
#: It is masked when its content fills less than the first share of the other's, which was not cut out, or than the
#: second, which was too. Measured: brains fill 0.42 to 0.76 of heads, 0.72 and more of other brains.
WHOLE, CUT = 0.8, 0.6
#: So much of the rim is left out: it is where whoever cut it out was least sure, and neighbours shine in, mm.
RIM = 3.0
#: Contents are compared on samples about so far apart, mm.
APART = 3.0


def masks(
    volumes: Sequence[Volume], given: Sequence[np.ndarray | None], notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The masks of fixed and moving scan: those given, or, where none is, that of a scan which was cut out.

    Args:
        volumes: fixed and moving.
        given: (D, H, W) bool on the scans' grids, or None.
        notes: what was found out is added.

    Returns:
        (D, H, W) bool on the grids of the fixed and of the moving scan, or None where everything counts.
    """
    fixed, moving = given
    if fixed is not None or moving is not None:
        return fixed, moving
    contents = [_content(volume) for volume in volumes]
    for own, (size, cut) in enumerate(contents):
        other, other_cut = contents[1 - own]
        if cut and size < (CUT if other_cut else WHOLE) * other:
            array = volumes[own].array
            notes.append(
                f"'{volumes[own].name}' was cut out of its surroundings (a brain without its skull?) and shows less "
                f"than '{volumes[1 - own].name}': they were compared only where it shows something"
            )
            found = _eroded(_between(array != array.flat[0]), volumes[own].grid.spacing)
            return (found, None) if own == 0 else (None, found)
    return fixed, moving


def _content(volume: Volume) -> tuple[float, bool]:
    """How much a scan's content fills, mm^3, and whether it was cut out of its surroundings."""
    array, spacing = volume.array, np.asarray(volume.grid.spacing)
    steps = np.maximum(1, np.round(APART / spacing)).astype(int)
    thin = array[:: steps[0], :: steps[1], :: steps[2]]
    inside = foreground(thin)
    air, voxels = array.flat[0], ~inside
    faces = [array.take(end, axis=axis) == air for axis in range(3) for end in (0, -1)]
    alike = sum(int(face.sum()) for face in faces) / sum(face.size for face in faces)
    cut = alike >= LEAST_FACE and float((thin[voxels] == air).mean() if voxels.any() else 0.0) >= LEAST_AIR
    return float(_between(inside).sum() * np.prod(steps * spacing)), cut


def _eroded(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The mask less its outermost :data:`RIM` mm; whole where less than a third would be left."""
    reach = [round(RIM / step) for step in spacing]
    outside = torch.from_numpy(~mask)[None, None].float()
    inner = (F.max_pool3d(outside, [2 * n + 1 for n in reach], 1, reach) == 0)[0, 0].numpy()
    return inner if inner.sum() > mask.sum() / 3 else mask


def _between(content: np.ndarray) -> np.ndarray:
    """Where content lies on both sides along all three axes: content with its holes."""
    out = np.ones_like(content)
    for axis in range(content.ndim):
        before = np.maximum.accumulate(content, axis=axis)
        behind = np.flip(np.maximum.accumulate(np.flip(content, axis), axis=axis), axis)
        out &= before & behind
    return out
