"""Carrying other nodes along with a result, and scoring it. Steps for :class:`~.logic.RegistrationLogic`.

Images and points go opposite ways. A point of the moving scan is moved by the inverse transform, whose FromParent
maps moving points to fixed points, exactly; nothing is inverted numerically. Volumes and segmentations are resampled
by the worker.
"""

import slicer
import vtk
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError

from . import exchange, exporting, nodes


def applySteps(run, toMove, fromMoving, folder, ask):
    """Generator: carry ``toMove`` to the other scan; returns the new nodes, in the run's folder.

    Args:
        ask: generator ``ask(command, arguments)`` that asks the worker.
    """
    target = run.node("fixed" if fromMoving else "moving")
    pull, push = (run.node(part) for part in (("forward", "inverse") if fromMoving else ("inverse", "forward")))
    if target is None or pull is None or push is None:
        raise InputError(_("A part of this registration was deleted."), _("Register again."))
    for node in toMove:
        _mover(node)  # refuses before anything is made
    made = []
    try:
        for node in toMove:
            made.append((yield from _mover(node)(node, target, pull, push, folder, ask)))
            if made[-1].IsA("vtkMRMLMarkupsNode"):
                describeRadii(run, made[-1] if fromMoving else node, made[-1])
    except BaseException:
        for node in made:
            nodes.discard(node)
        raise
    run.own(made)
    return made


def _mover(node):
    for kind, mover in (
        ("vtkMRMLMarkupsNode", _moveMarkups),
        ("vtkMRMLModelNode", _moveModel),
        ("vtkMRMLSegmentationNode", _moveSegmentation),
        ("vtkMRMLScalarVolumeNode", _moveVolume),
    ):
        if node.IsA(kind) and not (node.IsA("vtkMRMLMarkupsROINode") or node.IsA("vtkMRMLMarkupsPlaneNode")):
            return mover
    raise InputError(
        _("'{name}' cannot be carried along.").format(name=node.GetName()),
        _("Choose markups (points, lines, curves), models, segmentations or volumes."),
    )


def _copyOf(node, target):
    """A new node of the same kind, named for where it goes, with the same look; no parent transform."""
    scene = node.GetScene()
    name = scene.GenerateUniqueName(_("{name} on {target}").format(name=node.GetName(), target=target.GetName()))
    copy = scene.AddNewNodeByClass(node.GetClassName(), name)
    copy.CopyContent(node, True)
    copy.CreateDefaultDisplayNodes()
    if node.GetDisplayNode() is not None and copy.GetDisplayNode() is not None:
        copy.GetDisplayNode().CopyContent(node.GetDisplayNode(), True)
    copy.SetAndObserveTransformNodeID(None)
    return copy


def _toWorld(node):
    """vtkGeneralTransform from the node's own space to the world."""
    transform = vtk.vtkGeneralTransform()
    if node.GetParentTransformNode() is not None:
        node.GetParentTransformNode().GetTransformToWorld(transform)
    return transform


def _moveMarkups(node, target, pull, push, folder, ask):
    copy = _copyOf(node, target)
    copy.ApplyTransform(_toWorld(node))
    copy.ApplyTransform(push.GetTransformFromParent())
    yield
    return copy


def describeRadii(run, fixedSide, markups):
    """Tell each control point of ``markups`` the radius that holds 68 % of the errors there, where the run's
    map is calibrated.

    Args:
        fixedSide: the markups node with the same points in the fixed scan, on which the map lies.
    """
    node = run.node("uncertainty")
    if node is None or not (run.metrics.get("uncertainty") or {}).get("calibrated"):
        return
    array, grid = nodes.worldVolume(node)
    for k in range(markups.GetNumberOfControlPoints()):
        ras = [0.0] * 3
        fixedSide.GetNthControlPointPositionWorld(k, ras)
        index = [int(round(i)) for i in grid.indices((-ras[0], -ras[1], ras[2]))]
        if all(0 <= i < n for i, n in zip(index, array.shape)):
            markups.SetNthControlPointDescription(
                k, _("68 %: within {radius:.2f} mm").format(radius=float(array[tuple(index)]))
            )


def _moveModel(node, target, pull, push, folder, ask):
    mesh = node.GetMesh()
    if mesh is None or mesh.GetNumberOfPoints() == 0:
        raise InputError(_("Model '{name}' has no points.").format(name=node.GetName()), _("Choose another model."))
    points = yield from nodes.movePoints(mesh.GetPoints(), _toWorld(node))
    points = yield from nodes.movePoints(points, push.GetTransformFromParent())
    copy = _copyOf(node, target)
    moved = mesh.NewInstance()
    moved.DeepCopy(mesh)
    moved.SetPoints(points)
    copy.SetAndObserveMesh(moved)
    return copy


def _moveVolume(node, target, pull, push, folder, ask):
    labels = node.IsA("vtkMRMLLabelMapVolumeNode")
    array, grid = nodes.worldVolume(node)
    result = yield from _resampled(array, grid, target, pull, folder, ask, "labels" if labels else "image")
    fill = yield from nodes.volumeFiller(*result)
    copy = _copyOf(node, target)
    fill(copy)
    return copy


def _moveSegmentation(node, target, pull, push, folder, ask):
    array, grid = nodes.worldLabels(node, None)
    result = yield from _resampled(array, grid, target, pull, folder, ask, "labels")
    fill = yield from nodes.volumeFiller(*result)
    scene = node.GetScene()
    labels = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "SymRegistration labels")
    try:
        labels.SetHideFromEditors(1)
        fill(labels)
        name = scene.GenerateUniqueName(_("{name} on {target}").format(name=node.GetName(), target=target.GetName()))
        copy = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        copy.CreateDefaultDisplayNodes()
        copy.SetReferenceImageGeometryParameterFromVolumeNode(labels)
        source = node.GetSegmentation()
        identities = vtk.vtkStringArray()
        for index in range(source.GetNumberOfSegments()):
            old = source.GetNthSegment(index)
            identities.InsertNextValue(copy.GetSegmentation().AddEmptySegment("", old.GetName(), old.GetColor()))
        _fillSegments(copy, labels, identities)
    finally:
        nodes.discard(labels)
    return copy


def _fillSegments(segmentationNode, labels, identities):
    """Segment k gets the voxels with value k + 1."""
    array = nodes.volumeArray(labels)
    full = array.copy()
    for index in range(identities.GetNumberOfValues()):
        array[:] = full == index + 1
        labels.GetImageData().Modified()
        one = vtk.vtkStringArray()
        one.InsertNextValue(identities.GetValue(index))
        slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, segmentationNode, one)


def _resampled(array, grid, target, pull, folder, ask, kind):
    """Generator: the worker resamples an array onto the target volume's grid; returns (array, Grid)."""
    paths = {name: folder.file(f"{name}.nrrd") for name in ("input", "reference", "output")}
    paths["transform"] = folder.file("transform.h5")
    yield from exchange.writeVolume(paths["input"], array, grid)
    yield from exchange.writeVolume(paths["reference"], *nodes.worldVolume(target))
    yield from exporting.exportField(pull, paths["transform"])
    yield from ask("apply", {**paths, "kind": kind})
    return (yield from exchange.readVolume(paths["output"]))


def evaluateSteps(run, labels, points, folder, ask):
    """Generator: Dice and landmark error of a run; returns the run's metrics with the new numbers in place."""
    fixed, moving = run.node("fixed"), run.node("moving")
    if fixed is None or moving is None or run.node("forward") is None:
        raise InputError(_("A part of this registration was deleted."), _("Register again."))
    arguments = {"transform": folder.file("forward.h5"), "fixed": folder.file("fixed.nrrd")}
    numbers = exporting.labelNumbers(*labels)

    def exportLabels(node, volume, folder, name):
        return exporting.exportLabels(node, volume, folder, name, numbers[name.partition("_")[0]])

    for pair, export, kind in ((labels, exportLabels, "labels"), (points, exporting.exportPoints, "points")):
        if (pair[0] is None) != (pair[1] is None):
            raise InputError(
                _("Only one of two {kind} is chosen.").format(kind=kind), _("Choose them for both scans, or for none.")
            )
        if pair[0] is not None:
            for side, node, volume in (("fixed", pair[0], fixed), ("moving", pair[1], moving)):
                arguments[f"{side}_{kind}"] = yield from export(node, volume, folder, f"{side}_{kind}")
    if len(arguments) == 2:
        raise InputError(_("There is nothing to evaluate with."), _("Choose labels or landmarks of both scans."))
    yield from exchange.writeVolume(arguments["fixed"], *nodes.worldVolume(fixed))
    yield from exporting.exportField(run.node("forward"), arguments["transform"])
    result = yield from ask("evaluate", arguments)
    metrics = run.metrics
    for part in ("labels", "landmarks"):
        if result[part] is not None:
            metrics[part] = result[part]
    told = {str(k): name for side in ("moving", "fixed") for name, k in (numbers[side] or {}).items()}
    if result["labels"] is not None:
        metrics["job"]["names"] = {**metrics["job"].get("names", {}), "labels": told}
    run.setMetrics(metrics)
    return metrics
