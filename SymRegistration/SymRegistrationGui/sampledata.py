"""A pair of synthetic head scans with a known deformation: for the Try it button, the tutorial and the self-test.

Made on the spot in a tenth of a second, so nothing is downloaded. The moving head is turned, shifted and bent against
the fixed one; ten landmarks with known partners measure the result.
"""

import logging
import os

import numpy as np
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.geometry.grid import Grid

from . import nodes
from .steps import complete

SHAPE = (76, 92, 72)
SPACING = 2.5
_LANDMARKS = np.array(
    [
        (0, 0, 20),
        (35, 0, 24),
        (-35, 0, 24),
        (0, 48, 20),
        (0, -48, 20),
        (0, 0, 55),
        (0, 5, -22),
        (25, 30, 34),
        (-28, 25, 0),
        (20, -35, 38),
    ],
    float,
)


def head(points):
    """Intensity of the synthetic head at (..., 3) LPS mm: skull, brain with folds, ventricles, cerebellum, face, neck,
    a tumor.
    """
    x, y, z = np.moveaxis(points, -1, 0)

    def ball(center, radii):
        return np.sqrt(sum(((v - c) / r) ** 2 for v, c, r in zip((x, y, z), center, radii)))

    def inside(value, sharpness=25.0):
        return 1 / (1 + np.exp(np.clip(sharpness * (value - 1), -60, 60)))

    skull = ball((0, 0, 14), (62, 80, 62))
    folds = np.sin(x / 6.5) * np.sin(y / 7.5 + 1) * np.sin(z / 7 + 0.5)
    neck = np.maximum(np.hypot(x / 40, (y - 16) / 44), 1 + (z + 10) / 40)
    skin = np.minimum.reduce(
        [
            skull,
            neck,
            ball((0, -52, -38), (44, 36, 40)),
            ball((0, -88, -8), (9, 14, 13)),
            ball((60, 4, -4), (8, 12, 18)),
            ball((-60, 4, -4), (8, 12, 18)),
        ]
    )
    tissue = 350 * inside(skin, 16) - 280 * inside(skull / 0.93) + 150 * inside(skull / 0.86)
    tissue += 330 * inside(skull / 0.82 - 0.05 * folds) + 260 * inside(skull / 0.62 - 0.2 * folds)
    for side in (-1, 1):
        tissue -= 620 * inside(ball((11 * side, 4, 20), (8, 30, 11)), 10)
    tissue += 250 * inside(ball((0, 44, -34), (40, 26, 20)), 12) - 250 * inside(ball((0, -70, -32), (16, 12, 14)), 8)
    return np.maximum(tissue, 0) + 420 * inside(ball((30, -22, 34), (11, 11, 11)), 9)


def partner(points):
    """Where the moving head shows what the fixed head has at (..., 3) LPS mm: a turn, a shift and a smooth bend."""
    angle, tilt = np.deg2rad(14), np.deg2rad(-8)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    nod = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    x, y, z = np.moveaxis(points, -1, 0)
    bend = np.stack(
        [5 * np.sin(y / 26) * np.cos(z / 30), 4 * np.cos(x / 24) * np.sin(z / 27 + 0.6), 5 * np.sin(x / 28 + y / 35)],
        -1,
    )
    return (points + bend) @ (turn @ nod).T + np.array([9.0, -6.0, 11.0])


def arrays():
    """(fixed, moving, Grid): int16 arrays of the pair; the deformation is partner()'s up to inversion by iteration."""
    grid = Grid.centred(SHAPE, SPACING, (0, 0, 0))
    points = grid.points(np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).astype(np.float32)).astype(
        np.float32
    )
    moving = head(points)
    fixed = head(partner(points))
    noise = np.random.default_rng(7).normal(0, 8, (2, *SHAPE))
    return (fixed + noise[0]).round().astype(np.int16), (moving + noise[1]).round().astype(np.int16), grid


def fixedLandmarks():
    """(10, 3) LPS mm of points on the fixed head; their partners are partner() of them."""
    inverse = _LANDMARKS.copy()
    for _unused in range(60):  # places on the fixed head whose partners are the given places of the moving one
        inverse -= partner(inverse) - _LANDMARKS
    return inverse


def makePair(scene):
    """(fixed volume, moving volume, fixed landmarks, moving landmarks): new nodes; see also :func:`showPair`."""
    fixed, moving, grid = arrays()
    made = []
    for name, array in ((_("Head, fixed"), fixed), (_("Head, moving"), moving)):
        node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", scene.GenerateUniqueName(name))
        complete(nodes.volumeFiller(array, grid))(node)
        node.CreateDefaultDisplayNodes()
        node.GetDisplayNode().AutoWindowLevelOff()
        node.GetDisplayNode().SetWindowLevelMinMax(0, 1000)
        made.append(node)
    points = fixedLandmarks()
    for name, places in ((_("Landmarks, fixed"), points), (_("Landmarks, moving"), partner(points))):
        node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", scene.GenerateUniqueName(name))
        for index, place in enumerate(nodes.rasFromLps(places)):
            node.AddControlPoint(place.tolist(), f"L{index + 1}")
        node.CreateDefaultDisplayNodes()
        node.GetDisplayNode().SetVisibility(False)
        made.append(node)
    return tuple(made)


def showPair(fixed, moving):
    """Both scans in all slice views, half each, as they lie."""
    slicer.util.setSliceViewerLayers(background=fixed, foreground=moving, foregroundOpacity=0.5, fit=True)


CATEGORY = "SymRegistration"
#: Slicer's own data sets that make the second entry; Sample Data shows the thumbnail of the first one.
TUMOR_PAIR = ("MRBrainTumor1", "MRBrainTumor2")


def register(modulePath):
    """Offer both pairs in the Sample Data module; registering again changes nothing.

    The heads are made by a click on their button. ``SampleData.downloadSample("SymRegistrationHeads")`` finds no file
    to load, because it never asks a custom downloader; scripts call :func:`makePair`. The tumor pair has files: both
    ways work.
    """
    import SampleData

    icons = os.path.join(os.path.dirname(modulePath), "Resources", "Icons")
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category=CATEGORY,
        sampleName="SymRegistrationHeads",
        uris=[],
        fileNames=[],
        nodeNames=[],
        thumbnailFileName=os.path.join(icons, "SymRegistrationHeads.png"),
        customDownloader=_makeHeads,
    )
    sources = [SampleData.SampleDataLogic().sourceForSampleName(name) for name in TUMOR_PAIR]
    if any(source is None for source in sources):
        logging.getLogger("SymRegistration").warning(
            "SymRegistration: this Slicer has no sample data %s", " and ".join(TUMOR_PAIR)
        )
        return
    fields = {
        field: [value for source in sources for value in getattr(source, field)]
        for field in ("uris", "fileNames", "nodeNames", "checksums", "loadFiles", "loadFileTypes")
    }
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category=CATEGORY, sampleName="SymRegistrationTumorPair", **fields
    )


def _makeHeads(source):
    """What the button does. One function, not a new one each time: Sample Data compares sources by their texts."""
    made = list(makePair(slicer.mrmlScene))
    showPair(*made[:2])
    return made
