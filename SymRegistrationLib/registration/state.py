"""What is needed to go on from a finished registration: its half-way fields, its pose, what was asked, of which scans.

On disk it is one ``.safetensors`` file of a few megabytes: fields in steps of 1/256 voxel as 16-bit whole numbers, each
predicted from its neighbours (the Lorenzo predictor) and deflated. Reading gives back the fields to 0.002 voxel.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fields import FieldPair, compose, resize_field
from ..files import replacing
from ..geometry.grid import Grid
from ..geometry.itk_hdf5 import deflated
from ..geometry.volumes import Volume
from ..job import InputError, existing_file
from .alignment import Alignment
from .carrying import Carried
from .working_grid import Scan, WorkingPair

#: Parts of a voxel that are stored.
STEPS = 256
_FORMAT = "1"
_BROKEN = "Register again to get a new one."


@dataclass(frozen=True, eq=False)
class Finished:
    """A registration as it lies in memory when it is done.

    Attributes:
        volumes, masks, scans: fixed and moving, as given and prepared.
        space: the working pair.
        pair: both directions on it, with half-way fields and their inverses among the details.
        carried: the same on the scans' own grids.
        facts: numbers and maps that a continuation does not change, by name.
    """

    volumes: tuple[Volume, Volume]
    masks: tuple[np.ndarray | None, np.ndarray | None]
    scans: tuple[Scan, Scan]
    space: WorkingPair
    pair: FieldPair
    carried: Carried
    facts: dict[str, Any]

    def prepared(
        self, volumes: Sequence[Volume], masks: Sequence[np.ndarray | None], device: torch.device
    ) -> tuple[Scan, Scan] | None:
        """The scans as they were prepared, or None when these are others, have other masks or lie elsewhere."""
        same = all(one is other for one, other in zip(volumes, self.volumes)) and all(
            one is other or (one is not None and other is not None and np.array_equal(one, other))
            for one, other in zip(masks, self.masks)
        )
        return self.scans if same and self.space.fixed.device == device else None


@dataclass(frozen=True, eq=False)
class State:
    """A finished registration, ready to go on.

    Attributes:
        halves: (2, 3, D, H, W) float32 half-way fields in voxels of ``grid``, middle -> fixed first, then -> moving.
        grid: the working grid, mid-space LPS mm.
        pose: the initial alignment, whose halves lead from mid-space to the scans.
        similarity: what the optimiser maximised.
        inputs: fingerprints of the fixed and the moving scan, then of further contrasts, pair by pair.
        finished: in memory only: everything else that the registration made, so that the next step makes again only
            what changes; None when it is not there.
    """

    halves: Tensor
    grid: Grid
    pose: Alignment
    similarity: str
    inputs: tuple[str, ...]
    finished: Finished | None = None

    @classmethod
    def of(
        cls, pair: FieldPair, space: WorkingPair, pose: Alignment, similarity: str, inputs: tuple[str, ...]
    ) -> State:
        """The state of a result on its working pair; ``pose`` is replaced by that of the working pair
        where they differ."""
        if not np.allclose(pose.matrix, space.mid_to_moving @ np.linalg.inv(space.mid_to_fixed), atol=1e-9) or (
            not np.allclose(pose.mid_to_fixed, space.mid_to_fixed, atol=1e-9)
        ):
            pose = Alignment(
                space.mid_to_fixed, space.mid_to_moving, pose.kind, pose.similarity, pose.confidence, pose.measure
            )
        halves = pair.details.get("halves")
        halves = _parted(pair) if halves is None else halves
        return cls(halves.float().cpu(), space.grid, pose, similarity, inputs)

    def on(self, shape: Sequence[int]) -> State:
        """The same on another number of voxels over the same corners, for finer work."""
        factor = [(o - 1) / max(n - 1, 1) for n, o in zip(shape, self.grid.shape)]
        d, h, w = shape
        grid = Grid((d, h, w), self.grid.matrix @ np.diag([*factor, 1.0]))
        return replace(self, halves=resize_field(self.halves, shape), grid=grid, finished=None)

    def check_inputs(self, *volumes: Volume) -> None:
        """Refuse scans that are not those of this state, in the order of :attr:`inputs`. Contrasts that it does not
        know may join, and others may be left out. Raises InputError naming the first that differs."""
        seen = self.finished.volumes if self.finished else ()
        for volume, known in zip(volumes, self.inputs):
            if not any(volume is other for other in seen) and fingerprint(volume) != known:
                raise InputError(
                    f"'{volume.name}' is not the scan that was registered; it was changed or replaced since.",
                    "Put the scan back as it was, or register again.",
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write to a ``.safetensors`` file, whole or not at all. Raises RegistrationError when the disk refuses."""
        from safetensors.torch import save_file

        values = (self.halves * STEPS).round().clamp(-32767, 32767).to(torch.int16).numpy()
        known = {
            "format": _FORMAT,
            "shape": list(self.grid.shape),
            "grid": self.grid.matrix.tolist(),
            "mid_to_fixed": self.pose.mid_to_fixed.tolist(),
            "mid_to_moving": self.pose.mid_to_moving.tolist(),
            "pose": [self.pose.kind, _plain(self.pose.similarity), self.pose.confidence, self.pose.measure],
            "similarity": self.similarity,
            "inputs": list(self.inputs),
        }
        packed = torch.frombuffer(bytearray(_packed(values)), dtype=torch.uint8)
        with replacing(path) as temporary:
            save_file({"halves": packed}, str(temporary), {"symreg_state": json.dumps(known)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> State:
        """Read what :meth:`save` wrote. Raises InputError: missing, damaged, or of another format."""
        from safetensors import safe_open

        path = existing_file(path, "state of the registration")
        try:
            with safe_open(str(path), "pt") as file:
                known = json.loads((file.metadata() or {})["symreg_state"])
                if known["format"] != _FORMAT:
                    raise InputError(f"state '{path}' has the unknown format '{known['format']}'.", _BROKEN)
                grid = Grid(tuple(known["shape"]), np.array(known["grid"]))
                values = _unpacked(file.get_tensor("halves").numpy().tobytes(), (2, 3, *grid.shape))
            kind, alike, confidence, measure = known["pose"]
            pose = Alignment(
                np.array(known["mid_to_fixed"], float).reshape(4, 4),
                np.array(known["mid_to_moving"], float).reshape(4, 4),
                kind,
                float("nan") if alike is None else alike,
                confidence,
                measure,
            )
            halves = torch.from_numpy(values.astype(np.float32)) / STEPS
            return cls(halves, grid, pose, known["similarity"], tuple(known["inputs"]))
        except InputError:
            raise
        except Exception as error:  # safetensors has its own class of errors; a damaged file may raise anything
            raise InputError(
                f"state '{path}' could not be read ({type(error).__name__}: {str(error)[:100]}).", _BROKEN
            ) from None


def fingerprint(volume: Volume) -> str:
    """32 hexadecimal digits that change when a voxel value or the place of the grid (by 1e-4 mm) does."""
    digest = hashlib.sha256(f"{volume.array.dtype.str}{volume.grid.shape}".encode())
    digest.update((np.round(volume.grid.matrix, 4) + 0.0).tobytes())
    digest.update(np.ascontiguousarray(volume.array).data)
    return digest.hexdigest()[:32]


def _parted(pair: FieldPair) -> Tensor:
    """Half-way fields of a result that has none: matches parted in the middle, the second half exactly what remains."""
    from .optimisers.syn import split_halves

    own = split_halves(pair)[:1]
    return torch.cat([own, compose(pair.fixed_to_moving, own)])


def _plain(value: float) -> float | None:
    return None if value != value else value


def _packed(values: np.ndarray) -> bytes:
    """int16 array, differenced along the last three axes (wrapping around), low and high bytes apart, deflated."""
    for axis in (-1, -2, -3):
        values = np.diff(values, axis=axis, prepend=values.dtype.type(0))
    return deflated(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2).T.tobytes())


def _unpacked(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The way back of :func:`_packed`. Raises ValueError when the sizes do not fit."""
    size = 2 * int(np.prod(shape))
    unzip = zlib.decompressobj()
    raw = unzip.decompress(packed, size + 1)
    if len(raw) != size:
        raise ValueError("its size does not fit its shape")
    values = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(2, -1).T).view(np.int16).reshape(shape)
    for axis in (-1, -2, -3):
        values = np.cumsum(values, axis=axis, dtype=np.int16)
    return values
