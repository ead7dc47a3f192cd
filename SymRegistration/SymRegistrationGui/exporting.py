"""From the nodes a user chose to the files and the job that the worker gets. Refuses, in words, what cannot work."""

import csv
import dataclasses
from dataclasses import dataclass, field

import numpy as np
from slicer.i18n import tr as _

from SymRegistrationLib.geometry import itk_hdf5
from SymRegistrationLib.job import InputError, Job, Options, RegistrationError

from . import exchange, nodes


@dataclass
class Request:
    """What a user asked for; every node may be None except the two volumes.

    Attributes:
        outputs: part -> existing node to be updated (see runs.PARTS, and "table").
        wanted: parts to make.
    """

    fixedNode: object
    movingNode: object
    options: Options = field(default_factory=Options)
    fixedMask: object = None
    movingMask: object = None
    roi: object = None
    initialTransform: object = None
    fixedLabels: object = None
    movingLabels: object = None
    fixedPoints: object = None
    movingPoints: object = None
    guideWithPoints: bool = False
    outputs: dict = field(default_factory=dict)
    wanted: tuple = ("forward", "inverse", "warped_moving", "jacobian")


def check(request):
    """Everything that can be refused before any work.

    Raises:
        InputError: naming the node and the remedy.
    """
    fixed, moving = request.fixedNode, request.movingNode
    for node, what in ((fixed, _("fixed")), (moving, _("moving"))):
        if node is None or node.GetScene() is None:
            raise InputError(_("No {what} volume is chosen.").format(what=what), _("Choose the two scans to register."))
    if fixed is moving:
        raise InputError(
            _("'{name}' is chosen as fixed and as moving volume.").format(name=fixed.GetName()),
            _("Choose two different scans."),
        )
    for node in (fixed, moving):
        if node.GetClassName() == "vtkMRMLLabelMapVolumeNode":
            raise InputError(
                _("'{name}' is a label map, not a scan.").format(name=node.GetName()),
                _("Choose a scan; label maps can be masks or be compared under Evaluate."),
            )
        array = nodes.volumeArray(node)
        if array.flat[0] == array[array.shape[0] // 2, array.shape[1] // 2, array.shape[2] // 2] and _constant(array):
            raise InputError(
                _("'{name}' is empty: all its voxels have the value {value}.").format(
                    name=node.GetName(), value=array.flat[0]
                ),
                _("Choose a volume with a scan in it."),
            )
    for one, other, what in (
        (request.fixedPoints, request.movingPoints, _("landmarks")),
        (request.fixedLabels, request.movingLabels, _("labels")),
    ):
        if (one is None) != (other is None):
            raise InputError(
                _("{what} are chosen for one scan only.").format(what=what.capitalize()),
                _("Choose them for both scans, or for none."),
            )
    if request.guideWithPoints and request.fixedPoints is None:
        raise InputError(
            _("Landmarks shall guide the alignment, but none are chosen."), _("Choose landmarks of both scans.")
        )
    _checkPoints(request)
    _checkOutputs(request)


def _constant(array):
    """True when every voxel is equal; looks at every eighth slice first, which settles nearly every scan."""
    first = array.flat[0]
    return bool((array[::8, ::4, ::4] == first).all() and (array == first).all())


def _checkPoints(request):
    if request.fixedPoints is None:
        return
    counts = [len(nodes.worldPoints(node)[1]) for node in (request.fixedPoints, request.movingPoints)]
    if counts[0] != counts[1]:
        raise InputError(
            _("'{fixed}' has {a} landmarks and '{moving}' has {b}.").format(
                fixed=request.fixedPoints.GetName(), a=counts[0], moving=request.movingPoints.GetName(), b=counts[1]
            ),
            _("Both lists need the same landmarks."),
        )
    if request.guideWithPoints and counts[0] < 3:
        raise InputError(
            _("{count} landmarks cannot guide the alignment.").format(count=counts[0]),
            _("Place at least 3 in both scans."),
        )


def _checkOutputs(request):
    inputs = [
        node
        for node in (
            request.fixedNode,
            request.movingNode,
            request.fixedMask,
            request.movingMask,
            request.fixedLabels,
            request.movingLabels,
            request.initialTransform,
        )
        if node is not None
    ]
    seen = []
    for node in request.outputs.values():
        if node is None:
            continue
        if any(node is other for other in inputs):
            raise InputError(
                _("'{name}' is an input and cannot be an output as well.").format(name=node.GetName()),
                _("Choose another output, or let the module make one."),
            )
        if any(node is other for other in seen):
            raise InputError(
                _("'{name}' is chosen for two outputs.").format(name=node.GetName()), _("Choose different nodes.")
            )
        seen.append(node)


def exportJob(request, folder):
    """Generator: write all inputs into ``folder`` (:class:`~.exchange.PrivateFolder`); returns the Job.

    Raises:
        InputError: an input turned out to be unusable.
    """
    grids, files = {}, {}
    for side, node in (("fixed", request.fixedNode), ("moving", request.movingNode)):
        array, grids[side] = nodes.worldVolume(node)
        files[side] = folder.file(f"{side}.nrrd")
        yield from exchange.writeVolume(files[side], array, grids[side])
        yield from _exportMask(side, request, grids[side], files, folder)
        for kind in ("Labels", "Points"):
            chosen = getattr(request, side + kind)
            if chosen is not None:
                name = f"{side}_{kind.lower()}"
                export = exportLabels if kind == "Labels" else exportPoints
                files[name] = yield from export(chosen, node, folder, name)
    options = request.options
    if request.initialTransform is not None:
        options = _withStart(options, request, folder)
    return Job(
        output=folder.file("result"), report=False, guide_with_points=request.guideWithPoints, options=options, **files
    )


def _exportMask(side, request, grid, files, folder):
    mask = getattr(request, f"{side}Mask")
    roi = request.roi if side == "fixed" else None
    if mask is None and roi is None:
        return
    name = f"{side}_mask"
    files[name] = folder.file(f"{name}.nrrd")
    if mask is None:
        array = yield from nodes.roiMask(roi, grid)
        yield from exchange.writeVolume(files[name], array, grid)
        return
    array, maskGrid = nodes.worldLabels(mask, getattr(request, f"{side}Node"))
    array = (array != 0).astype(np.uint8)
    yield
    if roi is not None:
        array &= yield from nodes.roiMask(roi, maskGrid)
    if not array.any():
        raise InputError(
            _("Mask '{name}' is empty.").format(name=mask.GetName()), _("Draw something into it, or choose none.")
        )
    yield from exchange.writeVolume(files[name], array, maskGrid)


def exportLabels(node, volumeNode, folder, name):
    """Generator: a label map or segmentation as file; returns its path."""
    array, grid = nodes.worldLabels(node, volumeNode)
    yield
    path = folder.file(f"{name}.nrrd")
    yield from exchange.writeVolume(path, array, grid)
    return path


def exportPoints(node, volumeNode, folder, name):
    """Generator: control points as CSV in LPS mm; returns its path."""
    points, labels = nodes.worldPoints(node)
    path = folder.file(f"{name}.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "l", "p", "s"])
        writer.writerows([label, *map(repr, map(float, point))] for label, point in zip(labels, points))
    yield
    return path


def exportField(node, path):
    """Generator: a result transform as .h5 file, not compressed."""
    field, grid, before, after = yield from nodes.fieldOf(node)
    if before is None:
        parts = [itk_hdf5.grid_part(grid, field)]
    else:
        parts = itk_hdf5.compact_parts(grid, field, before, after)
    yield
    try:
        itk_hdf5.write_transforms(path, parts, level=0)
    except OSError as error:
        raise RegistrationError(
            f"the transform could not be handed over ({error.strerror}).", _("Free some space on the temporary disk.")
        ) from None
    yield


def _withStart(options, request, folder):
    """Options that start from the chosen transform."""
    start = request.initialTransform
    if nodes.isAbove(start, request.movingNode):
        # The moving volume was exported with this parent already applied; applying it twice would be wrong.
        return dataclasses.replace(options, initial="none")
    matrix = nodes.startMatrix(start)
    path = folder.file("initial.tfm")
    numbers = [*matrix[:3, :3].ravel(), *matrix[:3, 3]]
    with open(path, "w", encoding="ascii") as file:
        file.write(
            "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
            f"Parameters: {' '.join(repr(float(v)) for v in numbers)}\nFixedParameters: 0 0 0\n"
        )
    return dataclasses.replace(options, initial=path)
