"""What the user has chosen, saved with the scene; and the request that follows from it."""

from typing import Annotated, Union

import slicer
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from SymRegistrationLib.job import FORMER_NAMES, Options
from SymRegistrationLib.registration.catalogue import needs_weights

from .exporting import Request

#: The wrapper tells a selector's node types by the annotation, so this is also what the user can choose. A Union of
#: nodes needs None, unlike a single node type: without it, the wrapper cannot write the empty value.
Labels = Union[slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode, None]  # noqa: UP007  what 5.10 knows


@parameterNodeWrapper
class Parameters:
    """Names are those of the ``SlicerParameterName`` properties in the .ui file."""

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedMask: Labels
    movingMask: Labels
    roi: slicer.vtkMRMLMarkupsROINode
    initialTransform: slicer.vtkMRMLTransformNode
    fixedLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    movingLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    guideWithLandmarks: bool = False

    method: str = "syn"
    preset: str = "default"
    similarity: str = "auto"
    initial: str = "affine"
    device: str = "auto"
    weights: str = ""
    refine: Annotated[int, WithinRange(0, 4)] = 0
    uncertaintyRuns: Annotated[int, WithinRange(0, 20)] = 0

    makeWarpedMoving: bool = True
    makeWarpedFixed: bool = False
    makeJacobian: bool = True
    makeConsistency: bool = True
    outputForward: slicer.vtkMRMLTransformNode
    outputInverse: slicer.vtkMRMLTransformNode
    outputWarpedMoving: slicer.vtkMRMLScalarVolumeNode
    outputWarpedFixed: slicer.vtkMRMLScalarVolumeNode
    outputJacobian: slicer.vtkMRMLScalarVolumeNode
    outputConsistency: slicer.vtkMRMLScalarVolumeNode
    outputUncertainty: slicer.vtkMRMLScalarVolumeNode

    resultTable: slicer.vtkMRMLTableNode
    fixedLabels: Labels
    movingLabels: Labels


def renamed(node):
    """The node of the state, read from a scene that may be older: what it holds under a former name has today's.

    A former name is only there when such a scene was just read; what today's name holds then is a default that the
    wrapper has filled in.
    """
    for former, name in FORMER_NAMES.items():
        value = node.GetParameter(former)
        if value:
            node.SetParameter(name, value)
            node.UnsetParameter(former)
    return node


#: part of a run -> (parameter of its output node, parameter that switches it, "" = always)
OUTPUTS = {
    "forward": ("outputForward", ""),
    "inverse": ("outputInverse", ""),
    "warped_moving": ("outputWarpedMoving", "makeWarpedMoving"),
    "warped_fixed": ("outputWarpedFixed", "makeWarpedFixed"),
    "jacobian": ("outputJacobian", "makeJacobian"),
    "inverse_consistency": ("outputConsistency", "makeConsistency"),
    "uncertainty": ("outputUncertainty", "uncertaintyRuns"),
}


def isScan(node):
    """True for a volume that can be registered; label maps, vector and tensor volumes are subclasses of its class."""
    return node is not None and node.GetClassName() == "vtkMRMLScalarVolumeNode"


def scans(scene):
    """All scans of a scene that a user can see in lists."""
    volumes = [
        scene.GetNthNodeByClass(k, "vtkMRMLScalarVolumeNode")
        for k in range(scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode"))
    ]
    return [node for node in volumes if isScan(node) and not node.GetHideFromEditors()]


def guessScans(parameters, scene):
    """With exactly two scans in the scene there is nothing to choose."""
    found = scans(scene)
    if parameters.fixedVolume is None and parameters.movingVolume is None and len(found) == 2:
        parameters.fixedVolume, parameters.movingVolume = found


def swap(parameters):
    """Exchange the two sides."""
    wasModifying = parameters.StartModify()
    try:
        for kind in ("Volume", "Mask", "Landmarks", "Labels"):
            first, second = getattr(parameters, f"fixed{kind}"), getattr(parameters, f"moving{kind}")
            setattr(parameters, f"fixed{kind}", second)
            setattr(parameters, f"moving{kind}", first)
    finally:
        parameters.EndModify(wasModifying)


def choosePair(parameters, fixed, moving, fixedPoints, movingPoints):
    """Another pair of scans with landmarks; its results shall be new nodes."""
    wasModifying = parameters.StartModify()
    try:
        parameters.fixedVolume, parameters.movingVolume = fixed, moving
        parameters.fixedLandmarks, parameters.movingLandmarks = fixedPoints, movingPoints
        for output, _switch in OUTPUTS.values():
            setattr(parameters, output, None)
        parameters.resultTable = None
    finally:
        parameters.EndModify(wasModifying)


def wantedParts(parameters):
    """The parts of a run that are switched on."""
    return tuple(
        part for part, (_output, switch) in OUTPUTS.items() if not switch or int(getattr(parameters, switch)) > 0
    )


def options(parameters):
    """Options of the library. Raises InputError for a combination that is not allowed."""
    network = needs_weights(parameters.method)
    return Options(
        method=parameters.method,
        preset=parameters.preset,
        similarity=parameters.similarity,
        initial="none" if parameters.initial == "transform" else parameters.initial,
        refine=parameters.refine if network else 0,
        device=parameters.device,
        weights=(parameters.weights or None) if network else None,
        uncertainty="fast" if parameters.uncertaintyRuns == 1 else parameters.uncertaintyRuns,
    )


def request(parameters):
    """The :class:`~.exporting.Request` of what is chosen now."""
    wanted = wantedParts(parameters)
    labels = (parameters.fixedLabels, parameters.movingLabels)
    labels = labels if None not in labels else (None, None)
    points = (parameters.fixedLandmarks, parameters.movingLandmarks)
    points = points if None not in points else (None, None)
    outputs = {
        part: getattr(parameters, OUTPUTS[part][0])
        for part in wanted
        if getattr(parameters, OUTPUTS[part][0]) is not None
    }
    if outputs.get("forward") is not None and parameters.resultTable is not None:
        outputs["table"] = parameters.resultTable
    return Request(
        fixedNode=parameters.fixedVolume,
        movingNode=parameters.movingVolume,
        options=options(parameters),
        fixedMask=parameters.fixedMask,
        movingMask=parameters.movingMask,
        roi=parameters.roi,
        initialTransform=parameters.initialTransform if parameters.initial == "transform" else None,
        fixedLabels=labels[0],
        movingLabels=labels[1],
        fixedPoints=points[0],
        movingPoints=points[1],
        guideWithPoints=parameters.guideWithLandmarks and points[0] is not None,
        outputs=outputs,
        wanted=wanted,
    )


def rememberOutputs(parameters, run):
    """Point the output selectors at what a run made, so that the next run updates it instead of piling up nodes."""
    wasModifying = parameters.StartModify()
    try:
        for part, (output, _switch) in OUTPUTS.items():
            node = run.node(part)
            if node is not None:
                setattr(parameters, output, node)
        parameters.resultTable = run.table
    finally:
        parameters.EndModify(wasModifying)
