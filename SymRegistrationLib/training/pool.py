"""A pool of training pairs on disk: made once from label maps, cut off at any moment, gone on with by the same call.

What stands in front of a method (pose and matching) is frozen while the method's own levels are trained, a clean
rendering can be registered by ``syn`` beforehand, and rendering takes longer than a training step. All of it is
therefore done once. Each pair holds two realistic scans that pose and matching have already brought into their mean
frame, both label maps there, and, as a teacher, the half-way displacement fields that ``syn`` finds on clean renderings
of the same labels.

A scan is rendered at half the working voxel and averaged (partial volume), with texture, blur, a bias field, noise, in
a tenth of the scans thick slices; T1-like unless a random contrast is drawn. Every pair is a pure function of the
pool's settings, its seed and its number, and its file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import json_object
from ..job import InputError

#: Raised when pairs are made another way.
POOL_VERSION = 1
MANIFEST = "pool.json"
#: FreeSurfer numbers from which on labels lie outside of the brain.
_OUTSIDE = 500


@dataclass(frozen=True, eq=False)
class PoolPair:
    """One pair in its mean frame; image tensors (1, 1, D, H, W), fields (1, 3, D/2, H/2, W/2) in cells of two voxels.

    Attributes:
        moving, fixed: scans in [0, 1].
        moving_labels, fixed_labels: integer positions in ``values``.
        values: the labels.
        to_moving, to_fixed: the teacher's half-way displacement, mean frame -> scan; zero without a teacher.
        facts: contrast, Dice before and by the teacher, label maps.
    """

    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor
    fixed_labels: Tensor
    values: tuple[int, ...]
    to_moving: Tensor
    to_fixed: Tensor
    facts: dict


class Pool:
    """The pairs of a folder that are complete.

    Args:
        folder: made by :func:`pool_making.make`.

    Raises:
        InputError: no pool, one of another version, or one without a complete pair.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.files = sorted(self.folder.glob("pair_*.safetensors"))
        if not self.files:
            raise InputError(f"the pool '{folder}' holds no pair.", "Make it with: symreg pool")

    def __len__(self) -> int:
        return len(self.files)

    def pair(self, number: int) -> PoolPair:
        """The pair ``number`` (0 to len - 1). Raises InputError when its file is damaged."""
        path = self.files[number]
        try:
            with safe_open(path, framework="pt") as stream:
                t = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
                facts = json.loads(stream.metadata()["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"'{path}' of the pool is damaged ({error}).", "Make the pool again: only this pair is remade."
            ) from None
        return PoolPair(
            t["moving"].float(),
            t["fixed"].float(),
            t["moving_labels"],
            t["fixed_labels"],
            tuple(facts.pop("values")),
            t["to_moving"].float(),
            t["to_fixed"].float(),
            facts,
        )


def read_manifest(folder: Path) -> dict:
    """What a pool says of itself. Raises InputError when there is none, it is damaged, or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"'{folder}' is not a pool: it holds no {MANIFEST}.", "Make one with: symreg pool")
    found = json_object(path)
    if found is None:
        raise InputError(f"'{path}' is damaged.", "Delete it and make the pool again; complete pairs are kept.")
    if found.get("version") != POOL_VERSION:
        raise InputError(
            f"the pool '{folder}' is of version {found.get('version')}; this software makes version {POOL_VERSION}.",
            "Make a new pool in another folder.",
        )
    return found


def mean_dice(a: Tensor, b: Tensor, values: Sequence[int]) -> float:
    """Mean Dice of the labels of the brain that either map shows; label maps hold positions in ``values``."""
    scores = []
    for k in brain_labels(values):
        x, y = a == k, b == k
        total = int(x.sum()) + int(y.sum())
        if total > 50:
            scores.append(2 * int((x & y).sum()) / total)
    return sum(scores) / max(len(scores), 1)


#: Labels of the brain that are compared: FreeSurfer's 29 structures without fluid outside of ventricles, vessels
#: and lesions.
STRUCTURES = (
    2,
    3,
    4,
    7,
    8,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
    26,
    28,
    41,
    42,
    43,
    46,
    47,
    49,
    50,
    51,
    52,
    53,
    54,
    58,
    60,
)


def brain_labels(values: Sequence[int]) -> list[int]:
    """Positions of the compared structures; of label maps without FreeSurfer numbers all but background."""
    chosen = [k for k, v in enumerate(values) if v in STRUCTURES]
    return chosen if len(chosen) > 4 else [k for k, v in enumerate(values) if 0 < v < _OUTSIDE]
