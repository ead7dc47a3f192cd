"""Scans on disk made ready for training: found, every one checked, and brought onto one grid once.

A folder is searched for scans, label maps, masks and landmarks that belong together by name (BIDS or flat); a
table names them itself. Nothing is computed before every file has been read once and each bad one has been named.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import reason, replacing
from ..geometry.grid import Grid, canonical_axes
from ..geometry.points import read_points
from ..geometry.volumes import Volume, labels_on_grid, read_labels, read_mask, read_volume
from ..job import InputError, Progress, RegistrationError, existing_file, silent
from ..registration import working_grid
from .synthetic import LabelMap, label_map

#: Raised when what the cache holds is made another way.
CACHE_VERSION = 2
_VOLUMES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh")
_POINTS = (".mrk.json", ".fcsv", ".csv")
_KINDS = {
    "labels": ("aseg", "dseg", "seg", "segmentation", "label", "labels", "labelmap", "lobes", "parc", "aparc+aseg"),
    "mask": ("mask", "brainmask"),
    "points": ("landmarks", "points", "fiducials", "landmark"),
}
#: Last words of a file name that say what a scan is, not whom it shows.
_MODALITIES = (
    "t1w",
    "t2w",
    "t1",
    "t2",
    "flair",
    "pd",
    "ct",
    "mr",
    "mri",
    "pet",
    "brain",
    "head",
    "image",
    "img",
    "norm",
    "orig",
)
_COLUMNS = ("image", "labels", "mask", "points", "subject", "split")
_PAIR = tuple(f"{side}_{name}" for side in ("fixed", "moving") for name in ("labels", "mask", "points"))


@dataclass(frozen=True)
class Case:
    """Files of one scan; paths as given.

    Attributes:
        image: the scan; ``None`` when only its labels are used.
        labels, mask, points: what belongs to it, or ``None``.
        subject: who it shows; pairs are made of different subjects.
        split: ``train``, ``validation`` or "" = not decided.
    """

    image: str | None
    labels: str | None = None
    mask: str | None = None
    points: str | None = None
    subject: str = ""
    split: str = ""

    @property
    def name(self) -> str:
        """The file that stands for it in messages."""
        return self.image or self.labels or "nothing"


@dataclass(frozen=True)
class Listing:
    """What a folder or table holds.

    Attributes:
        cases: the scans.
        pairs: (moving, fixed) positions in ``cases`` where a table gives pairs; ``None`` = all with all.
        problems: (file, what is wrong) of what was left out.
        source: folder or table.
    """

    cases: tuple[Case, ...]
    pairs: tuple[tuple[int, int], ...] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    source: str = ""

    def part(self, split: str) -> list[int]:
        """Positions of the cases of a split."""
        return [k for k, case in enumerate(self.cases) if case.split == split]


@dataclass(frozen=True)
class Facts:
    """What checking learns of a scan: finest voxel size and extent of the content along canonical axes, mm."""

    spacing: float
    extent: tuple[float, float, float]


# ---------------------------------------------------------------------------------------------- finding


def find(path: str | Path, only_labels: bool = False) -> Listing:
    """List the scans of a folder or table.

    Args:
        path: folder, or CSV/TSV with a column ``image`` (and ``labels``, ``mask``, ``points``, ``subject``,
            ``split``), or with ``fixed`` and ``moving`` (and ``fixed_labels`` ...) for fixed pairs. Paths are relative
            to the table.
        only_labels: every volume is a label map.

    Raises:
        InputError: missing, empty, or a table that cannot be understood.
    """
    path = existing_file(path, "data")
    listing = _find_folder(path, only_labels) if path.is_dir() else _find_table(path, only_labels)
    if not listing.cases:
        what = "label map" if only_labels else "scan"
        raise InputError(
            f"'{path}' holds no {what}.", "Readable are NIfTI, NRRD, MHA/MHD and MGZ; or give a CSV table."
        )
    return listing


def _ending(path: Path, endings: Sequence[str]) -> str:
    name = path.name.lower()
    return next((end for end in endings if name.endswith(end)), "")


def _find_folder(folder: Path, only_labels: bool) -> Listing:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.parts))
    volumes = [f for f in files if _ending(f, _VOLUMES)]
    if only_labels:
        return Listing(tuple(Case(None, str(f), subject=_key(f)[0]) for f in volumes), source=str(folder))
    extras: dict[str, dict[str, Path]] = {}
    images = []
    for file in [*volumes, *(f for f in files if _ending(f, _POINTS))]:
        key, kind = _key(file)
        if kind != "image":
            extras.setdefault(key, {}).setdefault(kind, file)
        elif file in volumes:
            images.append(file)
    cases = []
    for image in images:
        subject = _key(image)[0]
        # "bert_brain" may belong to "bert_brain_mask" as well as to "bert_aseg".
        stem = image.name[: len(image.name) - len(_ending(image, _VOLUMES))]
        found = {**extras.get(stem.rpartition("_")[0], {}), **extras.get(subject, {}), **extras.get(stem, {})}
        cases.append(Case(str(image), subject=subject, **{kind: str(file) for kind, file in found.items()}))
    return Listing(tuple(cases), source=str(folder))


def _key(file: Path) -> tuple[str, str]:
    """(subject, kind) by name: ``sub-01_desc-brain_dseg.nii.gz`` and ``sub-01_T1w.nii.gz`` are both of ``sub-01``."""
    stem = file.name[: len(file.name) - len(_ending(file, (*_VOLUMES, *_POINTS)))]
    parts = stem.split("_")
    last = parts[-1].lower()
    kind = next((k for k, words in _KINDS.items() if last in words), "image")
    entities = [p for p in parts if re.match(r"(sub|ses)-", p)]
    if entities:
        return "_".join(entities), kind
    named = kind != "image" or last in _MODALITIES
    return ("_".join(parts[:-1]) if len(parts) > 1 and named else stem), kind


def _find_table(table: Path, only_labels: bool) -> Listing:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"table '{table}' could not be read as text ({error}).", "Give a folder, or a CSV or TSV file."
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    separator = (
        "\t" if lines and "\t" in lines[0] else ";" if lines and lines[0].count(";") > lines[0].count(",") else ","
    )
    try:
        rows = list(csv.DictReader(lines, delimiter=separator))
    except csv.Error as error:
        raise InputError(f"'{table}' is not a table ({error}).", "Give a folder, or a CSV or TSV file.") from None
    names = {str(name).strip().lower() for name in (rows[0] if rows else {})}
    paired = {"fixed", "moving"} <= names
    known = {"fixed", "moving", "split", *_PAIR} if paired else set(_COLUMNS)
    if not (paired or ("labels" if only_labels else "image") in names):
        raise InputError(
            f"table '{table}' has neither a column 'image' nor columns 'fixed' and 'moving'.",
            f"Its first line must name the columns: {', '.join(_COLUMNS)}.",
        )
    if names - known:
        raise InputError(
            f"table '{table}' has unknown columns: {', '.join(sorted(map(str, names - known)))}.",
            f"Known: {', '.join(sorted(known))}.",
        )
    rows = [{str(k).strip().lower(): (v or "").strip() for k, v in row.items() if k is not None} for row in rows]
    for number, row in enumerate(rows, 2):
        if row.get("split", "") not in ("", "train", "validation"):
            raise InputError(f"table '{table}', line {number}: split is '{row['split']}'.", "Use train or validation.")
    return _pair_rows(table, rows) if paired else _case_rows(table, rows, only_labels)


def _path(table: Path, value: str) -> str | None:
    return str(table.parent / value) if value else None


def _case_rows(table: Path, rows: list[dict], only_labels: bool) -> Listing:
    cases = [
        Case(
            None if only_labels else _path(table, row["image"]),
            *(_path(table, row.get(k, "")) for k in _COLUMNS[1:4]),
            row.get("subject", "") or f"row {number}",
            row.get("split", ""),
        )
        for number, row in enumerate(rows, 2)
    ]
    return Listing(tuple(case for case in cases if case.image or case.labels), source=str(table))


def _pair_rows(table: Path, rows: list[dict]) -> Listing:
    cases: dict[Case, int] = {}
    pairs = []
    for number, row in enumerate(rows, 2):
        at = []
        for side in ("moving", "fixed"):
            if not row.get(side):
                raise InputError(f"table '{table}', line {number}: {side} is empty.", "Name both scans of each pair.")
            extra = [_path(table, row.get(f"{side}_{kind}", "")) for kind in ("labels", "mask", "points")]
            case = Case(_path(table, row[side]), *extra, subject=row[side], split=row.get("split", ""))
            at.append(cases.setdefault(case, len(cases)))
        pairs.append((at[0], at[1]))
    return Listing(tuple(cases), tuple(pairs), source=str(table))


# ---------------------------------------------------------------------------------------------- checking


def check(listing: Listing, bad: str = "refuse", progress: Progress = silent) -> tuple[Listing, list[Facts]]:
    """Read every file once; what cannot be used is named.

    Args:
        bad: ``skip`` leaves bad scans out (pairs with them too), ``refuse`` stops.

    Returns:
        The listing of good scans, and their facts.

    Raises:
        InputError: a bad scan with ``refuse``, or nothing is left.
    """
    good, facts, problems = [], [], []
    for index, case in enumerate(listing.cases):
        progress("check", index / len(listing.cases), f"checking {Path(case.name).name}")
        try:
            facts.append(_check_case(case))
            good.append(index)
        except InputError as error:
            problems.append((case.name, error.message))
    if problems and (bad == "refuse" or not good):
        told = "\n".join(f"  {message}" for _, message in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(
            f"{len(problems)} of {len(listing.cases)} scans in '{listing.source}' cannot be used:\n{told}{more}\n",
            "Repair or remove them, or leave them out with --bad-scans skip.",
        )
    place = {old: new for new, old in enumerate(good)}
    pairs = listing.pairs
    if pairs is not None:
        pairs = tuple((place[m], place[f]) for m, f in pairs if m in place and f in place)
    return replace(listing, cases=tuple(listing.cases[k] for k in good), pairs=pairs, problems=tuple(problems)), facts


def _check_case(case: Case) -> Facts:
    volume = read_volume(case.image, "scan") if case.image else None
    labels = read_labels(case.labels) if case.labels else None
    main = volume or labels
    if labels is not None and not (labels.array > 0).any():
        raise InputError(f"label map '{case.labels}' holds no label.", "Draw something into it, or leave it out.")
    if labels is not None and len(np.unique(labels.array)) > 2000:
        raise InputError(
            f"label map '{case.labels}' has {len(np.unique(labels.array))} values: it looks like an image."
        )
    if labels is not None and volume is not None and not (labels_on_grid(labels, volume.grid) > 0).any():
        raise InputError(f"label map '{case.labels}' lies wholly outside its scan '{case.image}'.")
    if case.mask:
        read_mask(case.mask, main.grid)
    if case.points:
        read_points(case.points)
    if volume is not None:
        inside = working_grid.prepare(volume).inside
    else:
        where = np.argwhere(labels.array > 0)
        inside = main.grid.points(where[:: max(1, len(where) // 20_000)])
    box = np.percentile(inside @ canonical_axes(main.grid.axes), [0.5, 99.5], axis=0)
    return Facts(float(main.grid.spacing.min()), tuple(float(e) for e in box[1] - box[0]))


def divide(listing: Listing, validation: str, seed: int) -> Listing:
    """Give every case a split: as its table says, by name, or a share of the subjects drawn by ``seed``.

    Args:
        validation: a share from 0 to 0.9, or comma-separated parts of file names or subjects.

    Raises:
        InputError: a name that fits no scan, or a share that is none.
    """
    if any(case.split for case in listing.cases):
        return replace(listing, cases=tuple(replace(c, split=c.split or "train") for c in listing.cases))
    subjects = sorted({case.subject for case in listing.cases})
    try:
        share = float(validation)
    except ValueError:
        return _divide_by_name(listing, [name.strip() for name in validation.split(",") if name.strip()])
    if not 0 <= share <= 0.9:
        raise InputError(f"validation is {validation}.", "Give a share from 0 to 0.9, or names of scans.")
    count = min(len(subjects) - 1, max(2 if len(subjects) >= 6 else 1, round(share * len(subjects)))) if share else 0
    held = set(np.random.default_rng(seed).permutation(subjects)[:count])
    return replace(
        listing, cases=tuple(replace(c, split="validation" if c.subject in held else "train") for c in listing.cases)
    )


def _divide_by_name(listing: Listing, names: list[str]) -> Listing:
    for name in names:
        if not any(name in Path(c.name).name or name == c.subject for c in listing.cases):
            raise InputError(
                f"--validation names '{name}', which no scan in '{listing.source}' is called.",
                "Give parts of file names, subjects, or a share such as 0.15.",
            )
    return replace(
        listing,
        cases=tuple(
            replace(c, split="validation" if any(n in Path(c.name).name or n == c.subject for n in names) else "train")
            for c in listing.cases
        ),
    )


# ---------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Cache:
    """Resampled scans on disk; a file's name is the hash of everything it was made from.

    Attributes:
        folder: where.
        spacing, shape: of the working grid, mm and voxels.
    """

    folder: Path
    spacing: float
    shape: tuple[int, int, int]

    def scan(self, case: Case) -> dict[str, Tensor]:
        """``image`` (1, 1, D, H, W) half precision, black outside its mask, and, where given, ``labels`` int32 and
        ``points`` (1, P, 3) voxels, all on a grid of canonical axes about the content. Raises InputError when a file
        has gone bad."""
        return self._kept(case, "scan", lambda: self._make_scan(case))

    def labels(self, case: Case) -> LabelMap:
        """The label map of a case along canonical axes, at 3/4 of the working voxel but not finer than it is."""
        kept = self._kept(case, "labels", lambda: self._make_labels(case))
        return label_map(kept["labels"], float(kept["spacing"]), Path(case.labels or "").name)

    def _kept(self, case: Case, kind: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / f"{self._hash(case, kind)}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as stream:
                    return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
            except (SafetensorError, OSError):
                pass  # damaged: made again
        tensors = make()
        hint = "Free disk space, or choose another --output."
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistrationError(f"the cache '{self.folder}' cannot be written: {reason(error)}.", hint) from None
        with replacing(path, hint) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        return tensors

    def _hash(self, case: Case, kind: str) -> str:
        files = [case.labels] if kind == "labels" else [case.image, case.labels, case.mask, case.points]
        facts: list = [CACHE_VERSION, kind, self.spacing, list(self.shape) if kind == "scan" else None]
        for file in files:
            stat = os.stat(file) if file else None
            facts.append([str(Path(file).resolve()), stat.st_size, stat.st_mtime_ns] if file else None)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _make_scan(self, case: Case) -> dict[str, Tensor]:
        volume = read_volume(case.image, "scan")
        if case.mask:  # as a stripped scan would come
            kept = np.where(read_mask(case.mask, volume.grid), volume.array, volume.array.min())
            volume = Volume(kept, volume.grid, volume.name)
        scan = working_grid.prepare(volume)
        axes = canonical_axes(volume.grid.axes)
        box = np.percentile(scan.inside @ axes, [0.5, 99.5], axis=0)
        grid = Grid.centred(self.shape, self.spacing, axes @ box.mean(0), axes)
        image, _ = working_grid.resample(scan, grid, np.eye(4))
        out = {"image": image.half()}
        if case.labels:
            out["labels"] = torch.from_numpy(labels_on_grid(read_labels(case.labels), grid).astype(np.int32))[
                None, None
            ]
        if case.points:
            out["points"] = torch.from_numpy(grid.indices(read_points(case.points).points)).float()[None]
        return out

    def _make_labels(self, case: Case) -> dict[str, Tensor]:
        volume = read_labels(case.labels)
        axes = canonical_axes(volume.grid.axes)
        spacing = max(float(volume.grid.spacing.min()), 0.75 * self.spacing)
        box = volume.grid.corners() @ axes
        low, high = box.min(0), box.max(0)
        shape = np.maximum(np.floor((high - low) / spacing).astype(int) + 1, 1)
        grid = Grid.centred(shape, spacing, axes @ ((low + high) / 2), axes)
        array = labels_on_grid(volume, grid)
        return {"labels": torch.from_numpy(array.astype(np.int32)), "spacing": torch.tensor(spacing)}
