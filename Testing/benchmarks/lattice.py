"""How far compact transforms are from dense ones on real fields, and what a cubic interpolation of the lattice changes.

    python Testing/benchmarks/lattice.py DATA [--preset fast] [--pair sub-01 sub-02]

DATA is a folder with ``brain/``. A compact transform is a lattice about as fine as the working voxel between two
affines; our programs, ITK and ANTs interpolate it linearly, Slicer (vtkOrientedGridTransform) and nitransforms
cubically. Distances in mm at random points of the content, both directions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from SymRegistrationLib.geometry.grid import transform_points
from SymRegistrationLib.geometry.transforms import CompactTransform
from SymRegistrationLib.geometry.volumes import foreground, read_volume
from SymRegistrationLib.job import Options
from SymRegistrationLib.pipeline import register
from SymRegistrationLib.registration.physical import dense_grid

SEED = 20261121


def slicers(transform: CompactTransform, points: np.ndarray, cubic: bool) -> np.ndarray:
    """(n, 3) LPS mm, where Slicer's grid transform takes points, its lattice between the two affines."""
    grid, image = transform.grid, vtk.vtkImageData()
    image.SetDimensions(*grid.shape[::-1])
    image.SetSpacing(*grid.spacing[::-1])
    image.SetOrigin(*grid.matrix[:3, 3])
    array = numpy_to_vtk(np.ascontiguousarray(transform.displacement, np.float64).reshape(-1, 3), deep=True)
    image.GetPointData().SetScalars(array)
    direction = vtk.vtkMatrix4x4()
    for row in range(3):
        for column in range(3):
            direction.SetElement(row, column, float(grid.axes[row, 2 - column]))
    inner = slicer.vtkOrientedGridTransform()
    inner.SetDisplacementGridData(image)
    inner.SetGridDirectionMatrix(direction)
    inner.SetInterpolationModeToCubic() if cubic else inner.SetInterpolationModeToLinear()
    inner.Update()
    between = [inner.TransformPoint(*p) for p in transform_points(transform.before, points).tolist()]
    return transform_points(transform.after, np.array(between))


def told(name: str, apart: np.ndarray) -> None:
    """One line: mean, 95th percentile and largest distance."""
    length = np.linalg.norm(apart, axis=1)
    print(f"  {name:34} mean {length.mean():.4f}, 95 % {np.percentile(length, 95):.4f}, largest {length.max():.3f} mm")


def main() -> None:
    """Register one pair and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--pair", nargs=2, default=["sub-01", "sub-02"])
    asked = parser.parse_args()
    fixed, moving = (read_volume(asked.data / "brain" / f"{name}_brain.nii.gz", name) for name in asked.pair)
    result = register(fixed, moving, Options(preset=asked.preset))
    random = np.random.default_rng(SEED)
    print(f"{asked.pair[0]} <- {asked.pair[1]}, preset {asked.preset}, seed {SEED}")
    ends = {}
    for name, transform, scan in (("forward", result.forward, fixed), ("inverse", result.inverse, moving)):
        inside = np.argwhere(foreground(scan.array))
        inside = inside[random.choice(len(inside), 20_000, replace=False)] + random.uniform(-0.5, 0.5, (20_000, 3))
        points = scan.grid.points(inside)
        print(f"{name}: lattice {transform.grid.shape} of {transform.grid.spacing.min():.2f} mm")
        here = transform.map_points(points)
        dense = transform.resampled(dense_grid(scan.grid, float(transform.grid.spacing.min())))
        told("dense (--dense) against compact", dense.map_points(points) - here)
        middles = scan.grid.points(np.round(inside))
        told("the same at the voxels", dense.map_points(middles) - transform.map_points(middles))
        told("Slicer, linear, against ours", slicers(transform, points, False) - here)
        told("Slicer, cubic, against linear", slicers(transform, points, True) - here)
        ends[name] = points, here, slicers(transform, points, True)
    points, linear, cubic = ends["forward"]
    told("inverse consistency, linear", result.inverse.map_points(linear) - points)
    told("inverse consistency, cubic", slicers(result.inverse, cubic, True) - points)


if __name__ == "__main__":
    main()
