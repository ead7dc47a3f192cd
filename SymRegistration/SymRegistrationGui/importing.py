"""From the worker's result files to nodes. The scene changes in one step, at the end."""

import numpy as np
import slicer

from SymRegistrationLib.registration.catalogue import is_linear

from . import exchange, history, nodes, runs
from .layers import temporaryVolume


def importSteps(folder, scans, outputs, metrics, names=None):
    """Generator: the files of a finished job into nodes, and its steps into the run; returns the :class:`~.runs.Run`.

    Args:
        folder: the :class:`~.exchange.PrivateFolder` of the job, whose results lie in ``result``.
        scans: ``fixed``, ``moving`` and the names of further contrasts -> volume.
        outputs: part -> existing node to be updated, and ``table``.
        metrics: of the worker.
        names: what people call things that have numbers in ``metrics``: ``labels`` and ``points``.
    """
    fillers, fixedNode, movingNode = {}, scans["fixed"], scans["moving"]
    for part, name in metrics["files"].items():
        if part in runs.PARTS:
            fillers[part] = yield from _filler(part, folder.file(f"result/{name}"), metrics)
    metrics["job"]["names"] = {"fixed": fixedNode.GetName(), "moving": movingNode.GetName(), **(names or {})}
    kept = yield from history.read(folder)
    previous = _shownBefore(outputs.get("table"))
    run = runs.commit(fixedNode, movingNode, fillers, outputs, metrics)
    for name, node in scans.items():
        run.setNode(name, node, False)
    history.keep(run, kept)
    _remember(run, *previous)
    yield
    return run


#: Id of one run -> (vtkImageData, (4, 4) matrix) of the moving scan as its step before had registered it. Only the last
#: run is kept: this is for a quick look, and :func:`rememberSteps` makes it again.
_previous = {}


def _shownBefore(table):
    """The warped moving scan that is about to be replaced, (image, matrix); both None when there is none."""
    node = runs.Run(table).node("warped_moving") if runs.isResultTable(table) else None
    return (None, None) if node is None else nodes.imageOf(node)


def _remember(run, image, matrix):
    _previous.clear()
    if image is not None:
        _previous[run.id] = image, matrix


def rememberSteps(run, path):
    """Generator: keep a file of the worker's as the moving scan that the step before of ``run`` had registered."""
    fill = yield from nodes.volumeFiller(*(yield from exchange.readVolume(path)))
    holder = slicer.vtkMRMLScalarVolumeNode()
    fill(holder)
    _remember(run, *nodes.imageOf(holder))


def hasPrevious(run):
    """True when the registered scan of the step before is still at hand."""
    return run is not None and run.id in _previous


def previousNode(run):
    """A hidden volume with the moving scan as the step before had registered it; not saved with the scene. None when
    it is not at hand."""
    if not hasPrevious(run):
        return None
    node = run.node("previous")
    if node is None:
        node = temporaryVolume(run.scene, "SymRegistration previous step")
        run.setNode("previous", node, True)
        like = run.node("warped_moving")
        if like is not None and like.GetDisplayNode() is not None:
            node.CreateDefaultDisplayNodes()
            node.GetDisplayNode().CopyContent(like.GetDisplayNode(), True)
    nodes.placeImage(node, *_previous[run.id])
    return node


def _filler(part, path, metrics):
    """Generator: what fills the node of a part."""
    if part not in runs.TRANSFORMS:
        return (yield from nodes.volumeFiller(*(yield from exchange.readVolume(path))))
    if is_linear(metrics["job"]["options"]["method"]) and metrics["job"].get("start_from") is None:
        matrix = np.array(metrics["alignment"]["matrix"], float).reshape(4, 4)
        return nodes.linearTransformFiller(matrix if part == "forward" else np.linalg.inv(matrix))
    return (yield from nodes.gridTransformFiller(*(yield from exchange.readTransform(path))))
