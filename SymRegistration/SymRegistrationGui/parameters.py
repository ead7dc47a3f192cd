"""What the user has chosen, saved with the scene; and the request that follows from it."""

import dataclasses
from typing import Annotated, Union

import slicer
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

from SymRegistrationLib.job import InputError, Options
from SymRegistrationLib.registration.catalogue import is_linear, needs_weights

from . import methods
from .exporting import Request, checkContrasts
from .parts import OUTPUTS, withOutputs
from .steering import Change

#: The wrapper tells a selector's node types by the annotation, so this is also what the user can choose. A Union of
#: nodes needs None, unlike a single node type: without it, the wrapper cannot write the empty value.
Labels = Union[slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode, None]  # noqa: UP007  what 5.10 knows

#: Where a repair may work: what is painted, or a box.
Regions = Union[  # noqa: UP007  what 5.10 knows
    slicer.vtkMRMLSegmentationNode, slicer.vtkMRMLLabelMapVolumeNode, slicer.vtkMRMLMarkupsROINode, None
]


@parameterNodeWrapper
@withOutputs
class Parameters:
    """Names are those of the ``SlicerParameterName`` properties in the .ui file; outputs bring theirs."""

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedMask: Labels
    movingMask: Labels
    fixedContrasts: list[slicer.vtkMRMLScalarVolumeNode]
    movingContrasts: list[slicer.vtkMRMLScalarVolumeNode]
    contrastWeights: list[float]
    roi: slicer.vtkMRMLMarkupsROINode
    initialTransform: slicer.vtkMRMLTransformNode
    fixedLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    movingLandmarks: slicer.vtkMRMLMarkupsFiducialNode
    guideWithLandmarks: bool = False
    sliding: str = "off"
    fixedSlidingMask: Labels
    movingSlidingMask: Labels

    driveLandmarks: bool = False
    landmarkWeight: Annotated[float, WithinRange(0.05, 1.0)] = 1.0
    landmarkTolerance: Annotated[float, WithinRange(0.1, 50.0)] = 2.0
    driveSegments: str = ""
    labelWeight: Annotated[float, WithinRange(0.05, 1.0)] = 0.8
    stiffness: Annotated[float, WithinRange(0.2, 10.0)] = 1.0

    alignKind: str = "rigid"
    anatomy: str = "unknown"
    method: str = "syn"
    preset: str = "default"
    metric: str = "auto"
    initial: str = "affine"
    device: str = "auto"
    weights: str = ""
    refine: Annotated[int, WithinRange(0, 4)] = 0
    uncertaintyRuns: Annotated[int, WithinRange(0, 20)] = 0

    liveView: bool = True
    resultTable: slicer.vtkMRMLTableNode
    fixedLabels: Labels
    movingLabels: Labels

    repairWhere: str = "node"
    repairRegion: Regions
    repairSegment: str = ""
    repairRadius: Annotated[float, WithinRange(1.0, 200.0)] = 15.0
    repairRim: Annotated[float, WithinRange(0.5, 100.0)] = 10.0
    repairStiffness: Annotated[float, WithinRange(0.2, 10.0)] = 1.0
    repairMetric: str = "same"
    repairSpacing: Annotated[float, WithinRange(0.0, 20.0)] = 0.0


#: Option of the library -> the parameter that holds it as it is.
OPTIONS = {
    "method": "method",
    "preset": "preset",
    "similarity": "metric",
    "initial": "initial",
    "device": "device",
    "stiffness": "stiffness",
    "sliding": "sliding",
}
#: What a preset by anatomy may also set: option -> parameter; the parameter may say it in another way.
_ALSO = {
    "refine": "refine",
    "weights": "weights",
    "uncertainty": "uncertaintyRuns",
    "label_weight": "labelWeight",
    "landmark_tolerance": "landmarkTolerance",
}
#: What belongs to one pair of scans, or is chosen beside a preset.
_NOT_IN_PRESETS = ("preset", "device", "landmark_weight", "drive_labels", "contrast_weights", "seed", "threads")
#: Those that a preset by anatomy sets back to their defaults where it does not name them.
_BY_ANATOMY = ("similarity", "initial", "stiffness", "sliding")


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
        for kind in ("Volume", "Mask", "Landmarks", "Labels", "SlidingMask"):
            first, second = getattr(parameters, f"fixed{kind}"), getattr(parameters, f"moving{kind}")
            setattr(parameters, f"fixed{kind}", second)
            setattr(parameters, f"moving{kind}", first)
        first, second = list(parameters.fixedContrasts), list(parameters.movingContrasts)
        parameters.fixedContrasts, parameters.movingContrasts = second, first
    finally:
        parameters.EndModify(wasModifying)


def choosePair(parameters, fixed, moving, fixedPoints, movingPoints):
    """Another pair of scans with landmarks; its results shall be new nodes."""
    wasModifying = parameters.StartModify()
    try:
        parameters.fixedVolume, parameters.movingVolume = fixed, moving
        parameters.fixedLandmarks, parameters.movingLandmarks = fixedPoints, movingPoints
        setContrasts(parameters, [])
        for output, _switch in OUTPUTS.values():
            setattr(parameters, output, None)
        parameters.resultTable = None
    finally:
        parameters.EndModify(wasModifying)


def setContrasts(parameters, rows, first=1.0):
    """Choose the further contrasts.

    Args:
        rows: (fixed, moving, weight) of each pair; a node may be None as long as it is not chosen.
        first: weight of the two scans themselves.
    """
    wasModifying = parameters.StartModify()
    try:
        parameters.fixedContrasts = [fixed for fixed, _moving, _weight in rows]
        parameters.movingContrasts = [moving for _fixed, moving, _weight in rows]
        parameters.contrastWeights = [first, *(weight for _fixed, _moving, weight in rows)] if rows else []
    finally:
        parameters.EndModify(wasModifying)


def problem(parameters, known, aligning=False):
    """Why Register (or, ``aligning``, Align) cannot be pressed now, "" when it can.

    Args:
        parameters: may be None.
        known: name -> what :func:`.methods.methods` tells of it.
    """
    if parameters is None or parameters.fixedVolume is None or parameters.movingVolume is None:
        return _("Choose a fixed and a moving volume.")
    for node in (parameters.fixedVolume, parameters.movingVolume):
        if not isScan(node):
            return _("'{name}' is no scan: choose a volume with one gray value per voxel.").format(name=node.GetName())
    if parameters.fixedVolume is parameters.movingVolume:
        return _("Choose two different volumes.")
    if aligning:
        return ""
    if parameters.initial == "transform" and parameters.initialTransform is None:
        return _("Choose the start transform, or another start.")
    method = known.get(parameters.method)
    if method is None:
        return _("Choose a method.")
    if not methods.usable(method, parameters.weights):
        return _("{method} needs trained weights: choose a weights file, or take the SyN optimizer.").format(
            method=method["title"]
        )
    try:
        if parameters.fixedContrasts or parameters.movingContrasts:
            checkContrasts(request(parameters))
    except InputError as error:
        return f"{error.message} {error.hint}"
    return ""


def wantedParts(parameters):
    """The parts of a run that are switched on."""
    return tuple(
        part for part, (_output, switch) in OUTPUTS.items() if not switch or int(getattr(parameters, switch)) > 0
    )


def options(parameters):
    """Options of the library. Raises InputError for a combination that is not allowed."""
    network = needs_weights(parameters.method)
    bends = not is_linear(parameters.method)
    chosen = {
        **{option: getattr(parameters, name) for option, name in OPTIONS.items()},
        "initial": "none" if parameters.initial == "transform" else parameters.initial,
        "refine": parameters.refine if network else 0,
        "weights": (parameters.weights or None) if network else None,
        "uncertainty": ("fast" if parameters.uncertaintyRuns == 1 else parameters.uncertaintyRuns) if bends else 0,
        "contrast_weights": ",".join(f"{weight:g}" for weight in parameters.contrastWeights),
        **(pulling(parameters) if bends else {"stiffness": 1.0}),
    }
    return Options(**{**hiddenOptions(parameters.anatomy), **chosen})


def pulling(parameters):
    """What of the options says how landmarks and structures pull, and how stiff the field is."""
    points = parameters.driveLandmarks and None not in pair(parameters, "Landmarks")
    return {
        "landmark_weight": parameters.landmarkWeight if points else 0.0,
        "landmark_tolerance": parameters.landmarkTolerance,
        "label_weight": parameters.labelWeight,
        "stiffness": parameters.stiffness,
    }


def driven(parameters):
    """Names of the structures that shall pull; empty when none do, or when segmentations are missing."""
    names = tuple(name for name in parameters.driveSegments.split("\n") if name)
    return names if None not in pair(parameters, "Labels") else ()


def pair(parameters, kind):
    """(fixed, moving) nodes of a kind, such as ``Landmarks``; (None, None) unless both are chosen."""
    found = getattr(parameters, f"fixed{kind}"), getattr(parameters, f"moving{kind}")
    return found if None not in found else (None, None)


def request(parameters):
    """The :class:`~.exporting.Request` of what is chosen now."""
    wanted = wantedParts(parameters)
    labels, points = pair(parameters, "Labels"), pair(parameters, "Landmarks")
    slide = parameters.sliding == "auto"
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
        fixedSlidingMask=parameters.fixedSlidingMask if slide else None,
        movingSlidingMask=parameters.movingSlidingMask if slide else None,
        fixedContrasts=tuple(parameters.fixedContrasts),
        movingContrasts=tuple(parameters.movingContrasts),
        guideWithPoints=parameters.guideWithLandmarks and points[0] is not None,
        outputs=outputs,
        wanted=wanted,
        driveSegments=() if is_linear(parameters.method) else driven(parameters),
        live=parameters.liveView and not is_linear(parameters.method),
    )


def alignRequest(parameters, start=None):
    """The request that only finds the pose; with ``start``, a linear transform node, refined from there."""
    made = request(parameters)
    settings = dataclasses.replace(
        made.options,
        method=parameters.alignKind,
        initial=parameters.alignKind if parameters.alignKind != "similarity" else "affine",
        uncertainty=0,
        landmark_weight=0.0,
        contrast_weights="",
        refine=0,
        weights=None,
    )
    return dataclasses.replace(
        made,
        options=settings,
        initialTransform=start,
        fixedContrasts=(),
        movingContrasts=(),
        driveSegments=(),
        live=False,
        wanted=tuple(part for part in made.wanted if part != "uncertainty"),
    )


def update(parameters):
    """The :class:`~.steering.Change` of an update with what is chosen now.

    Raises:
        InputError: neither landmarks nor structures shall pull.
    """
    settings = pulling(parameters)
    points = pair(parameters, "Landmarks") if settings["landmark_weight"] > 0 else (None, None)
    names = driven(parameters)
    labels = pair(parameters, "Labels") if names else (None, None)
    if points[0] is None and labels[0] is None:
        raise InputError(
            _("Nothing pulls, so there is nothing to update."),
            _("Choose landmarks or structures of both scans, and switch on under What pulls that they pull."),
        )
    if labels[0] is None:
        settings["drive_labels"] = ""
    return Change(*points, *labels, driveSegments=names, options=settings, live=parameters.liveView)


def repair(parameters, place=None):
    """The :class:`~.steering.Change` of a repair.

    Args:
        place: of a row of the table of doubtful places, as :func:`.results.places` gives it.

    Raises:
        InputError: no region, or no place, is chosen.
    """
    sphere = parameters.repairWhere == "place"
    if sphere and place is None:
        raise InputError(
            _("No place is chosen."),
            _("Click a folded or an uncertain place in the table of results, or take a region."),
        )
    if not sphere and parameters.repairRegion is None:
        raise InputError(
            _("No region is chosen."), _("Paint a segment, or place a box (ROI), over what shall be repaired.")
        )
    settings = {"stiffness": parameters.repairStiffness}
    if parameters.repairMetric != "same":
        settings["similarity"] = parameters.repairMetric
    if parameters.repairSpacing > 0:
        settings["spacing"] = parameters.repairSpacing
    return Change(
        region=None if sphere else parameters.repairRegion,
        segment=parameters.repairSegment,
        center=tuple(place) if sphere else None,
        radius=parameters.repairRadius,
        rim=parameters.repairRim,
        options=settings,
        live=parameters.liveView,
    )


def startFrom(parameters, pose):
    """What follows starts from this linear transform node; None = an alignment is looked for again."""
    wasModifying = parameters.StartModify()
    try:
        parameters.initialTransform = pose
        parameters.initial = "affine" if pose is None else "transform"
    finally:
        parameters.EndModify(wasModifying)


def applyAnatomy(parameters, name):
    """Choose a preset by anatomy: what it says is set where it can be seen, the rest goes back to its default. Method
    and effort stay, unless it names them."""
    wanted, usual = methods.anatomyOptions(name), Options()
    wasModifying = parameters.StartModify()
    try:
        parameters.anatomy = name
        for option in OPTIONS:
            if option in wanted or option in _BY_ANATOMY:
                setattr(parameters, OPTIONS[option], wanted.get(option, getattr(usual, option)))
        for option, parameter in _ALSO.items():
            if option in wanted:
                setattr(parameters, parameter, 1 if wanted[option] == "fast" else wanted[option])
    finally:
        parameters.EndModify(wasModifying)


def ownPreset(parameters):
    """Options for a preset by anatomy of the user's own: what is chosen now and differs from the library's defaults.
    How much time a run may take is chosen beside it, and what belongs to these two scans is left out."""
    chosen, usual = dataclasses.asdict(options(parameters)), dataclasses.asdict(Options())
    if parameters.initial == "transform":
        chosen["initial"] = usual["initial"]
    return {key: value for key, value in chosen.items() if value != usual[key] and key not in _NOT_IN_PRESETS}


def hiddenOptions(name):
    """Options of a preset by anatomy that no widget shows: they go along with it."""
    return {key: value for key, value in methods.anatomyOptions(name).items() if key not in {*OPTIONS, *_ALSO}}


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
