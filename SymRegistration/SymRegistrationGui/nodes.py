"""Between MRML nodes and plain arrays: the one place that knows both RAS (Slicer) and LPS (everything else).

Slicer's world is RAS mm, the library's is LPS mm; :data:`FLIP` turns one into the other, both ways. Arrays are (D, H,
W) = (K, J, I), fields are (D, H, W, 3) with vectors (x, y, z). Everything leaves Slicer in world coordinates: linear
parent transforms become part of the grid, other parents are applied to a copy.
"""

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util import numpy_support

from SymRegistrationLib.geometry.grid import Grid
from SymRegistrationLib.job import InputError

from .steps import pieces

#: RAS <-> LPS, its own inverse.
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
#: (I, J, K) columns <-> (D, H, W) columns of an index matrix.
_REVERSE = np.eye(4)[[2, 1, 0, 3]]


# ------------------------------------------------------------------------------------------------ geometry


def matrixFromVtk(matrix):
    """vtkMatrix4x4 as (4, 4) numpy array."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def vtkFromMatrix(array):
    """(4, 4) numpy array as vtkMatrix4x4."""
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(np.asarray(array, float).ravel().tolist())
    return matrix


def parentMatrix(node):
    """(4, 4) RAS mm, node -> world, or None when a parent transform is not linear."""
    parent = node.GetParentTransformNode()
    if parent is None:
        return np.eye(4)
    if not parent.IsTransformToWorldLinear():
        return None
    matrix = vtk.vtkMatrix4x4()
    parent.GetMatrixTransformToWorld(matrix)
    return matrixFromVtk(matrix)


def gridFromIjk(shape, ijkToRas):
    """Grid (LPS mm) of an array (K, J, I) whose voxel (i, j, k) lies at ``ijkToRas`` in RAS mm."""
    return Grid(shape, FLIP @ ijkToRas @ _REVERSE)


def ijkToRas(grid):
    """(4, 4): voxel (i, j, k) -> RAS mm of a grid."""
    return FLIP @ grid.matrix @ _REVERSE


def rasFromLps(points):
    """(n, 3) LPS mm -> (n, 3) RAS mm, and the same the other way."""
    return np.asarray(points, float) * np.diag(FLIP)[:3]


# ------------------------------------------------------------------------------------------------ out of Slicer


def volumeArray(node):
    """View of a volume node's voxels, (D, H, W). Raises InputError when it is not a 3-D scalar volume with voxels."""
    image = node.GetImageData()
    scalars = image.GetPointData().GetScalars() if image is not None else None
    if scalars is None or scalars.GetNumberOfTuples() == 0:
        raise InputError(_("'{name}' has no voxels.").format(name=node.GetName()), _("Load the scan again."))
    if scalars.GetNumberOfComponents() != 1:
        raise InputError(
            _("'{name}' has {count} values per voxel.").format(
                name=node.GetName(), count=scalars.GetNumberOfComponents()
            ),
            _("Choose a scan with one value per voxel."),
        )
    if min(image.GetDimensions()) < 2:
        raise InputError(_("'{name}' is a single slice.").format(name=node.GetName()), _("Choose a 3-D volume."))
    return numpy_support.vtk_to_numpy(scalars).reshape(image.GetDimensions()[::-1])


def worldVolume(node):
    """(array view, Grid) of a volume node in world coordinates; a non-linear parent is applied to a copy."""
    array = volumeArray(node)
    matrix = parentMatrix(node)
    if matrix is None:
        return _hardenedCopy(node, lambda copy: (volumeArray(copy).copy(), _ownGrid(copy, np.eye(4))))
    return array, _ownGrid(node, matrix)


def shareVoxels(source, target):
    """Let ``target`` show the voxels of ``source`` where they lie in world coordinates; only a scan below a non-linear
    parent is copied."""
    parent = parentMatrix(source)
    if parent is None:
        image, matrix = _hardenedCopy(source, lambda copy: (copy.GetImageData(), _ijkToRasOf(copy)))
    else:
        image, matrix = source.GetImageData(), parent @ _ijkToRasOf(source)
    placeImage(target, image, matrix)


def placeImage(node, image, matrix):
    """Let a volume node show ``image`` (vtkImageData) where ``matrix`` (as :func:`imageOf` gives it) says."""
    node.SetAndObserveImageData(image)
    node.SetIJKToRASMatrix(vtkFromMatrix(matrix))


def imageOf(node):
    """(vtkImageData, (4, 4) voxel -> the node's own RAS mm) of a volume node."""
    return node.GetImageData(), _ijkToRasOf(node)


def valueAt(node, ras):
    """The voxel of a volume node at a place in world coordinates (RAS mm), as a number; None outside."""
    array, grid = worldVolume(node)
    index = [int(round(float(i))) for i in grid.indices(rasFromLps(ras))]
    return float(array[tuple(index)]) if all(0 <= i < n for i, n in zip(index, array.shape)) else None


def worldCenter(node):
    """The middle of a volume, RAS mm in world coordinates."""
    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    return [(bounds[2 * axis] + bounds[2 * axis + 1]) / 2 for axis in range(3)]


def _ijkToRasOf(node):
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrixFromVtk(matrix)


def _ownGrid(node, parent):
    try:
        return gridFromIjk(node.GetImageData().GetDimensions()[::-1], parent @ _ijkToRasOf(node))
    except ValueError:
        raise InputError(
            _("'{name}' has a singular orientation.").format(name=node.GetName()), _("Load the scan again.")
        ) from None


def _hardenedCopy(node, use):
    """``use(copy)`` on a copy of ``node`` whose parent transforms were applied to it; the copy is removed."""
    scene = node.GetScene()
    copy = scene.AddNewNodeByClass(node.GetClassName(), node.GetName())
    try:
        copy.SetHideFromEditors(1)
        copy.CopyContent(node, True)
        copy.SetAndObserveTransformNodeID(node.GetTransformNodeID())
        if not copy.HardenTransform():
            raise InputError(
                _("the transform of '{name}' cannot be applied to it.").format(name=node.GetName()),
                _("Harden its transform in the Data module first."),
            )
        return use(copy)
    finally:
        discard(copy)


def discard(node):
    """Remove a node with its display and storage nodes, which the scene would keep."""
    scene = node.GetScene()
    for kind in ("Display", "Storage"):
        count = getattr(node, f"GetNumberOf{kind}Nodes", lambda: 0)()
        for other in [getattr(node, f"GetNth{kind}Node")(index) for index in range(count)]:
            if other is not None:
                scene.RemoveNode(other)
    scene.RemoveNode(node)


def worldLabels(node, referenceNode):
    """(array, Grid) of a label map, or of all segments of a segmentation (1, 2, ... in their order), in world."""
    if not node.IsA("vtkMRMLSegmentationNode"):
        return worldVolume(node)
    segmentation = node.GetSegmentation()
    if segmentation is None or segmentation.GetNumberOfSegments() == 0:
        raise InputError(
            _("segmentation '{name}' has no segment.").format(name=node.GetName()), _("Draw one, or choose none.")
        )
    scene = node.GetScene()
    labels = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "SymRegistration labels")
    colors = None
    try:
        labels.SetHideFromEditors(1)
        segments = vtk.vtkStringArray()
        for index in range(segmentation.GetNumberOfSegments()):
            segments.InsertNextValue(segmentation.GetNthSegmentID(index))
        exported = slicer.vtkSlicerSegmentationsModuleLogic.ExportSegmentsToLabelmapNode(
            node, segments, labels, referenceNode
        )
        colors = labels.GetDisplayNode().GetColorNode() if labels.GetDisplayNode() else None
        if not exported or labels.GetImageData() is None or not volumeArray(labels).any():
            raise InputError(
                _("segmentation '{name}' is empty on '{volume}'.").format(
                    name=node.GetName(), volume=referenceNode.GetName() if referenceNode else ""
                ),
                _("Check that it belongs to this scan, or choose none."),
            )
        array, grid = worldVolume(labels)
        return array.copy(), grid
    finally:
        if colors is not None and colors.GetScene() is not None:
            scene.RemoveNode(colors)
        discard(labels)


def segmentNames(node):
    """Names of the segments of a segmentation in their order; None for a label map, whose labels are numbers."""
    if not node.IsA("vtkMRMLSegmentationNode"):
        return None
    segmentation = node.GetSegmentation()
    count = segmentation.GetNumberOfSegments() if segmentation is not None else 0
    return [segmentation.GetNthSegment(index).GetName() for index in range(count)]


def worldPoints(node):
    """((n, 3) LPS mm, labels) of the placed control points of a markups node, in world coordinates."""
    points, labels, position = [], [], [0.0, 0.0, 0.0]
    for index in range(node.GetNumberOfControlPoints()):
        if node.GetNthControlPointPositionStatus(index) == slicer.vtkMRMLMarkupsNode.PositionDefined:
            node.GetNthControlPointPositionWorld(index, position)
            points.append(list(position))
            labels.append(node.GetNthControlPointLabel(index))
    if not points:
        raise InputError(
            _("'{name}' has no points.").format(name=node.GetName()), _("Place landmarks, or choose none.")
        )
    return rasFromLps(points), labels


def roiMask(roiNode, grid):
    """Generator: (D, H, W) uint8, 1 inside the ROI box. Raises InputError when no voxel of the grid is inside."""
    size = [0.0, 0.0, 0.0]
    roiNode.GetSizeWorld(size)
    objectToWorld = matrixFromVtk(roiNode.GetObjectToWorldMatrix())
    toBox = np.linalg.inv(objectToWorld) @ FLIP @ grid.matrix
    half = np.array(size) / np.linalg.norm(objectToWorld[:3, :3], axis=0) / 2
    steps = [np.arange(n, dtype=np.float32) for n in grid.shape]
    mask = np.ones(grid.shape, np.uint8)
    for start, stop in pieces(grid.shape[0], 8 * grid.shape[1] * grid.shape[2]):
        for axis in range(3):
            plane = toBox[axis, 1] * steps[1][:, None] + toBox[axis, 2] * steps[2] + toBox[axis, 3]
            depth = toBox[axis, 0] * steps[0][start:stop, None, None] + plane
            mask[start:stop] &= np.abs(depth) <= half[axis]
        yield
    if not mask.any():
        raise InputError(
            _("region '{name}' lies outside the fixed volume.").format(name=roiNode.GetName()),
            _("Move it onto the scan, or choose none."),
        )
    return mask


def isAbove(transformNode, node):
    """True when ``transformNode`` is among the parent transforms of ``node``."""
    parent = node.GetParentTransformNode()
    while parent is not None and parent is not transformNode:
        parent = parent.GetParentTransformNode()
    return parent is not None


def startMatrix(transformNode):
    """(4, 4) LPS mm, fixed -> moving, of a transform that brings the moving volume near the fixed one.

    Raises:
        InputError: the transform is not linear.
    """
    if not transformNode.IsTransformToWorldLinear():
        raise InputError(
            _("initial transform '{name}' is not linear.").format(name=transformNode.GetName()),
            _("Choose a rigid or affine transform."),
        )
    matrix = vtk.vtkMatrix4x4()
    transformNode.GetMatrixTransformToWorld(matrix)
    return FLIP @ np.linalg.inv(matrixFromVtk(matrix)) @ FLIP


# ------------------------------------------------------------------------------------------------ into Slicer


def volumeFiller(array, grid):
    """Generator: copies (D, H, W) in short pieces; returns ``fill(volumeNode)``, which is instant.

    Everything slow comes before the first node is touched, so a run that is cancelled leaves the scene as it was.
    """
    image = yield from _image(array)

    def fill(node):
        with slicer.util.NodeModify(node):
            node.SetAndObserveTransformNodeID(None)
            node.SetAndObserveImageData(image)
            node.SetIJKToRASMatrix(vtkFromMatrix(ijkToRas(grid)))

    return fill


def gridTransformFiller(displacement, grid, before=None, after=None):
    """Generator: as :func:`volumeFiller`, for a field that becomes FromParent of a transform node.

    Args:
        displacement: (D, H, W, 3) float32, LPS mm.
        grid: its grid; oblique grids keep their axes.
        before, after: (4, 4) LPS mm, affines applied before and after the field; None = none.
    """
    matrix = ijkToRas(grid)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image = yield from _image(displacement, np.diag(FLIP)[:3].astype(np.float32))
    image.SetOrigin(matrix[:3, 3])
    image.SetSpacing(spacing)
    directions = np.eye(4)
    directions[:3, :3] = matrix[:3, :3] / spacing
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(image)
    transform.SetGridDirectionMatrix(vtkFromMatrix(directions))
    if before is not None:
        whole = vtk.vtkGeneralTransform()  # each concatenated one is applied before those that are there
        for part in (_linear(after), transform, _linear(before)):
            whole.Concatenate(part)
        transform = whole

    def fill(node):
        with slicer.util.NodeModify(node):
            node.SetAndObserveTransformNodeID(None)
            node.SetAndObserveTransformFromParent(transform)

    return fill


def linearTransformFiller(matrix):
    """``fill(transformNode)`` for a linear result, (4, 4) LPS mm, which becomes FromParent, as fields do."""

    def fill(node):
        with slicer.util.NodeModify(node):
            node.SetAndObserveTransformNodeID(None)
            node.SetAndObserveTransformFromParent(_linear(np.asarray(matrix, float)))

    return fill


def _linear(matrix):
    """vtkTransform (RAS) of a (4, 4) matrix in LPS mm."""
    transform = vtk.vtkTransform()
    transform.SetMatrix(vtkFromMatrix(FLIP @ matrix @ FLIP))
    return transform


def gridTransform(node):
    """The field in a transform node: one FromParent grid, alone (older scenes) or between two linear transforms.

    Returns:
        (D, H, W, 3) view in RAS, its Grid, and the affines before and after it, (4, 4) LPS mm, None where it is alone.

    Raises:
        InputError: the node holds something else.
    """
    parts = vtk.vtkCollection()
    if node.GetTransformFromParent() is not None:
        node.FlattenGeneralTransform(parts, node.GetTransformFromParent())
    parts = [parts.GetItemAsObject(index) for index in range(parts.GetNumberOfItems())]
    fields = [part for part in parts if part.IsA("vtkOrientedGridTransform") and not part.GetInverseFlag()]
    transform = fields[0] if len(fields) == 1 else None
    linear = [part for part in parts if part.IsA("vtkLinearTransform")]
    if len(parts) == 3 and len(linear) == 2 and parts[1] is transform:
        before, after = (FLIP @ matrixFromVtk(part.GetMatrix()) @ FLIP for part in linear)
    elif len(parts) == 1:
        before = after = None
    else:
        transform = None
    if transform is None or transform.GetDisplacementGrid() is None:
        raise InputError(
            _("'{name}' is not a result of this module.").format(name=node.GetName()),
            _("Choose the transform of a registration."),
        )
    image = transform.GetDisplacementGrid()
    matrix = np.eye(4)
    directions = transform.GetGridDirectionMatrix()
    axes = np.eye(3) if directions is None else matrixFromVtk(directions)[:3, :3]
    matrix[:3, :3] = axes * np.array(image.GetSpacing())
    matrix[:3, 3] = image.GetOrigin()
    shape = image.GetDimensions()[::-1]
    array = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(*shape, 3)
    return array, gridFromIjk(shape, matrix), before, after


def fieldOf(node):
    """Generator: a copy of a result transform: (D, H, W, 3) float32 in LPS mm, Grid, and the affines before and after
    it, (4, 4) LPS mm or None. A linear one is a lattice of zeros behind its matrix."""
    if node.IsLinear() and node.GetTransformFromParent() is not None:
        matrix = vtk.vtkMatrix4x4()
        node.GetMatrixTransformFromParent(matrix)
        yield
        still = np.zeros((2, 2, 2, 3), np.float32)
        return still, Grid((2, 2, 2), np.eye(4)), FLIP @ matrixFromVtk(matrix) @ FLIP, np.eye(4)
    array, grid, before, after = gridTransform(node)
    field = np.empty(array.shape, np.float32)
    for start, stop in pieces(array.shape[0], array[0].nbytes):
        field[start:stop] = array[start:stop]
        field[start:stop, ..., :2] *= -1
        yield
    return field, grid, before, after


def movePoints(vtkPoints, transform):
    """Generator: a new vtkPoints, each point through a vtkAbstractTransform, in short pieces."""
    moved = vtk.vtkPoints()
    moved.SetDataType(vtkPoints.GetDataType())
    count = vtkPoints.GetNumberOfPoints()
    array = numpy_support.vtk_to_numpy(vtkPoints.GetData()) if count else np.empty((0, 3))
    part, out = vtk.vtkPoints(), vtk.vtkPoints()
    result = np.empty_like(array)
    for start in range(0, count, 20000):
        part.SetData(numpy_support.numpy_to_vtk(np.ascontiguousarray(array[start : start + 20000]), deep=1))
        out.Reset()
        transform.TransformPoints(part, out)
        result[start : start + 20000] = numpy_support.vtk_to_numpy(out.GetData())
        yield
    moved.SetData(numpy_support.numpy_to_vtk(result, deep=1))
    return moved


def _image(array, factors=None):
    """Generator: vtkImageData with a copy of (D, H, W), or of (D, H, W, 3) times ``factors`` (3)."""
    image = vtk.vtkImageData()
    image.SetDimensions(array.shape[2::-1])
    image.AllocateScalars(numpy_support.get_vtk_array_type(array.dtype), 1 if array.ndim == 3 else 3)
    target = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(array.shape)
    for start, stop in pieces(array.shape[0], array[0].nbytes):
        if factors is None:
            target[start:stop] = array[start:stop]
        else:
            np.multiply(array[start:stop], factors, out=target[start:stop])
        yield
    return image
