"""Making a pool: rendering, bringing together, registering, one pair after the other; see :mod:`pool`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import networks
from ..fields import compose, identity, warp
from ..files import replacing, write_whole
from ..job import InputError, Progress, silent
from ..networks._attention import up_blocks
from ..networks._match import CELL, Halves
from ..networks._prealign import PreAligned, _Frame
from ..registration import weights
from ..registration.optimisers import syn
from ..registration.schedule import Schedule
from . import dataset
from .appearance import normalised, random_contrast, render
from .pool import MANIFEST, POOL_VERSION, PoolPair, mean_dice, read_manifest
from .pool_options import PoolOptions
from .samples import seed_of
from .synthetic import (
    Draw,
    LabelMap,
    Synthesis,
    _affine,
    _into,
    look_up,
    random_poses,
    random_warp,
)

#: FreeSurfer numbers from which on labels lie outside of the brain.
_OUTSIDE = 500


def make(
    folder: str | Path,
    labels: str | Path,
    count: int,
    options: PoolOptions = PoolOptions(),
    held_out: str = "0",
    prealign: str = "sm-gicnet",
    progress: Progress = silent,
) -> dict:
    """Make a pool, or go on with one.

    Args:
        folder: of the pool.
        labels: folder or table of label maps.
        count: pairs the pool is to have.
        options: how pairs vary.
        held_out: comma-separated parts of file names that are not used; "0" = all are used.
        prealign: method or weights file whose pose and matching bring the scans together.
        progress: called after every pair.

    Returns:
        ``pairs``, ``made`` (by this call), ``folder``, ``dice_before`` and ``dice_teacher`` (means over the pool, the
        second one ``None`` without a teacher).

    Raises:
        InputError: no usable label map, a label map that is bad, a folder with a pool of other settings.
        RegistrationError: the disk is full.
    """
    folder = Path(folder)
    listing = dataset.divide(dataset.find(labels, only_labels=True), held_out, options.seed)
    listing, _ = dataset.check(listing, "refuse", progress)
    cases = [listing.cases[k] for k in listing.part("train")]
    if not cases:
        raise InputError(f"'{labels}' leaves no label map to make pairs from.", "Hold out fewer.")
    front, digest = prealignment(prealign)
    manifest = {
        "version": POOL_VERSION,
        "options": _stored(options),
        "prealign": digest,
        "label_maps": [Path(case.labels).name for case in cases],
    }
    _settle_manifest(folder, manifest)
    cache = dataset.Cache(folder / "labels", options.spacing / 2, options.shape)
    anatomy = lru_cache(maxsize=64)(lambda k: cache.labels(cases[k]))
    made, rows = 0, []
    for number in range(count):
        path = folder / f"pair_{number:05d}.safetensors"
        facts = _facts(path)
        if facts is None:
            first, second = _people(cases, options, number)
            pair = make_pool_pair(
                anatomy(first), anatomy(second), options, seed_of(options.seed, "pair", number), front
            )
            facts = pair.facts
            _write(path, pair)
            made += 1
        rows.append(facts)
        scores = f"Dice {facts['dice_before']:.3f}" + (
            f", teacher {facts['dice_teacher']:.3f}" if options.teacher else ""
        )
        progress("pool", (number + 1) / count, f"pair {number + 1} of {count}, {scores}")
    mean = {"dice_before": sum(row["dice_before"] for row in rows) / max(len(rows), 1), "dice_teacher": None}
    if options.teacher:
        mean["dice_teacher"] = sum(row["dice_teacher"] for row in rows) / max(len(rows), 1)
    return {"folder": str(folder), "pairs": len(rows), "made": made, **mean}


def _people(cases: Sequence[dataset.Case], options: PoolOptions, number: int) -> tuple[int, int]:
    """Positions of the label maps of the fixed and the moving scan of a pair."""
    draw = Draw(seed_of(options.seed, "pool", number))
    first = draw.integer(0, len(cases) - 1)
    others = [k for k, case in enumerate(cases) if case.subject != cases[first].subject]
    two = bool(others) and draw.chance(options.two_people)
    return first, others[draw.integer(0, len(others) - 1)] if two else first


def _stored(options: PoolOptions) -> dict:
    """The options as they come back from a file."""
    return json.loads(json.dumps(asdict(options)))


def _settle_manifest(folder: Path, manifest: dict) -> None:
    """Write what the pool is, or check that it is the same. Raises InputError."""
    path = folder / MANIFEST
    if path.is_file():
        found = read_manifest(folder)
        found["options"] = {**_stored(PoolOptions()), **found.get("options", {})}
        other = [name for name in manifest if found.get(name) != manifest[name]]
        if other:
            raise InputError(
                f"the pool '{folder}' was made with other {' and '.join(other)}.",
                "Use the same settings to go on, or another folder.",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the pool's folder '{folder}' cannot be written ({error.strerror}).", "Choose another folder."
        ) from None
    write_whole(path, json.dumps(manifest, indent=1) + "\n")


def prealignment(prealign: str) -> tuple[PreAligned, str]:
    """Pose and matching in evaluation mode, and the hash of their weights."""
    path = weights.find(
        prealign if prealign in networks.names() else "sm-gicnet",
        None if prealign in networks.names() else prealign,
        None,
    )
    found = weights.load(path)
    if not any(name.startswith("pose.") for name in found.tensors):
        raise InputError(f"'{path}' holds no pose and matching.", "Give weights of a method with prealign=true.")
    front = networks.create("sm-gicnet", "small", prealign=True)
    own = {name: value.float() for name, value in found.tensors.items() if name.startswith(("pose.", "match."))}
    front.load_state_dict({**front.state_dict(), **own})
    digest = hashlib.sha256(b"".join(own[name].numpy().tobytes() for name in sorted(own))).hexdigest()
    return front.eval(), digest[:16]


def _facts(path: Path) -> dict | None:
    """What a complete pair says of itself; ``None`` when it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118, not a mapping
                stream.get_slice(name).get_shape()
            facts = json.loads(stream.metadata()["facts"])
        return facts if {"dice_before", "dice_teacher"} <= facts.keys() else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, pair: PoolPair) -> None:
    tensors = {
        "moving": pair.moving.half(),
        "fixed": pair.fixed.half(),
        "moving_labels": pair.moving_labels,
        "fixed_labels": pair.fixed_labels,
        "to_moving": pair.to_moving.half(),
        "to_fixed": pair.to_fixed.half(),
    }
    with replacing(path, "Free disk space and give the same command again: complete pairs are kept.") as temporary:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            temporary,
            metadata={"facts": json.dumps({**pair.facts, "values": pair.values})},
        )


# ---------------------------------------------------------------------------------------------- one pair


@torch.no_grad()
def make_pool_pair(
    fixed_map: LabelMap, moving_map: LabelMap, options: PoolOptions, seed: int, front: PreAligned
) -> PoolPair:
    """Render, meet, register: one pair of the pool.

    Args:
        fixed_map, moving_map: anatomies; the same one twice for one person.
        options: see :class:`PoolOptions`.
        seed: of all random choices.
        front: pose and matching, in evaluation mode.
    """
    draw = Draw(seed)
    ranges = Synthesis.posed(options.shape, options.spacing, options, warp=options.warp)
    strip, fluid = draw.chance(options.strip), draw.chance(0.5)
    values = tuple(sorted({*fixed_map.values, *moving_map.values}))
    contrasts = _contrasts(values, options, draw)
    scans = []
    for anatomy, pose, contrast in zip((fixed_map, moving_map), random_poses(ranges, draw), contrasts):
        kept = torch.tensor([not strip or not (v >= _OUTSIDE or (fluid and v == 24)) for v in anatomy.values])
        to_map = _into(
            anatomy,
            torch.linalg.inv(pose),
            ranges,
            anatomy.centre(kept & torch.tensor([v > 0 for v in anatomy.values])),
        )
        table = torch.tensor([values.index(v) for v in anatomy.values], dtype=torch.uint8)
        scan = _Rendering(anatomy, to_map, random_warp(ranges, draw)[0], kept, table)
        scans.append((scan, *scan.images(contrast, options, draw)))
    (fixed, fixed_real, fixed_clean), (moving, moving_real, moving_clean) = scans
    frame = _met(front, moving_real, fixed_real, draw.chance(options.pose_only))
    out_m, out_f = frame.out(None, 1), frame.out(None, -1)
    met = [
        warp(image, out, padding="zeros")
        for image, out in ((moving_real, out_m), (fixed_real, out_f), (moving_clean, out_m), (fixed_clean, out_f))
    ]
    labels_m, labels_f = moving.labels(out_m), fixed.labels(out_f)
    facts = {
        "maps": [moving_map.name, fixed_map.name],
        "dice_before": mean_dice(labels_m, labels_f, values),
        "dice_teacher": None,
    }
    if options.teacher:
        halves = syn.split_halves(syn.optimise(met[3], met[2], Schedule()))
        to_fixed, to_moving = (F.avg_pool3d(half[None], CELL) / CELL for half in halves)
        moved = warp(labels_m.float(), up_blocks(to_moving, CELL), "nearest", "zeros").to(labels_m.dtype)
        stayed = warp(labels_f.float(), up_blocks(to_fixed, CELL), "nearest", "zeros").to(labels_f.dtype)
        facts["dice_teacher"] = mean_dice(moved, stayed, values)
    else:
        to_fixed = to_moving = torch.zeros((1, 3, *(n // CELL for n in options.shape)))
    return PoolPair(met[0], met[1], labels_m, labels_f, values, to_moving, to_fixed, facts)


@dataclass(frozen=True, eq=False)
class _Rendering:
    """One scan: where its voxels lie in a label map."""

    anatomy: LabelMap
    to_map: Tensor
    u: Tensor
    kept: Tensor
    table: Tensor

    def labels(self, out: Tensor) -> Tensor:
        """Positions in the pair's values seen through ``out`` (frame -> scan, voxels), nearest; uint8."""
        here = identity(out.shape[2:])
        return self._looked_up(here + compose(self.u, out))

    def _looked_up(self, positions: Tensor) -> Tensor:
        index = look_up(self.anatomy, _affine(self.to_map, positions))
        index = index * self.kept[index.long()].to(index.dtype)
        return self.table[index.long()]

    def images(self, contrast: tuple[Tensor, Tensor], options: PoolOptions, draw: Draw) -> tuple[Tensor, Tensor]:
        """(realistic, clean) scans on the working grid, rendered at half its voxel and averaged."""
        fine = [2 * n for n in options.shape]
        at = identity(fine) / 2 - 0.25 + up_blocks(self.u, 2) / 2
        labels = self._looked_up(at)
        clean = F.avg_pool3d(contrast[0][labels.long()], 2)
        thick = draw.uniform(3.0, 5.0) / options.spacing * 2 if draw.chance(options.thick) else 1.0
        ranges = Synthesis(
            shape=tuple(fine),
            spacing=options.spacing / 2,
            noise=options.noise,
            bias=options.bias,
            blur=0.8,
            thick=1.0,
            cut=0.05,
        )
        real = render(labels, contrast, ranges, draw)
        real = F.avg_pool3d(real, 2)
        if thick > 1:
            axis = draw.integer(0, 2)
            shape = list(real.shape[2:])
            coarse = [max(4, round(n * 2 / thick)) if k == axis else n for k, n in enumerate(shape)]
            real = F.interpolate(F.adaptive_avg_pool3d(real, coarse), size=shape, mode="trilinear", align_corners=False)
        return normalised(real), normalised(clean)


def _contrasts(values: Sequence[int], options: PoolOptions, draw: Draw) -> list[tuple[Tensor, Tensor]]:
    """Two contrasts, fixed first: T1-like ones differ a little, as scanners do."""
    out = []
    base = random_contrast(values, Synthesis(t1=1.0), draw)
    for _ in range(2):
        if draw.chance(options.random_contrast):
            out.append(random_contrast(values, Synthesis(t1=0.0), draw))
        else:
            jitter = torch.tensor([draw.uniform(-0.03, 0.03) if v else 0.0 for v in values])
            out.append(((base[0] + jitter).clamp_min(0), base[1]))
    return out


def _met(front: PreAligned, moving: Tensor, fixed: Tensor, pose_only: bool) -> _Frame:
    """The mean frame of two scans, with or without the matching."""
    frame = front._frame(moving, fixed)
    if not pose_only:
        return frame
    zero = torch.zeros_like(frame.halves.to_moving)
    return _Frame(frame.pose, Halves(zero, zero, ((zero, zero),)), frame.here)
