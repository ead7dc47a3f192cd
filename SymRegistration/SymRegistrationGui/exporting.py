"""From the nodes a user chose to the files and the job that the worker gets. Refuses, in words, what cannot work."""

import csv
import dataclasses
from dataclasses import dataclass, field

import numpy as np
from slicer.i18n import tr as _

from SymRegistrationLib.geometry import itk_hdf5
from SymRegistrationLib.job import InputError, Job, Options, RegistrationError
from SymRegistrationLib.registration import catalogue
from SymRegistrationLib.registration.catalogue import is_linear, needs_weights

from . import exchange, nodes


@dataclass
class Request:
    """What a user asked for; every node may be None except the two volumes.

    Attributes:
        outputs: part -> existing node to be updated (see runs.PARTS, and "table").
        wanted: parts to make.
        fixedContrasts, movingContrasts: further volumes of the two sides, pair by pair; weights are in the options.
        fixedSlidingMask, movingSlidingMask: segmentations or label maps of what slides along its surroundings.
        driveSegments: names of the structures (numbers, for label maps) that shall pull; ("all",) = every shared one.
        live: tell of each level of the optimizer.
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
    fixedSlidingMask: object = None
    movingSlidingMask: object = None
    fixedContrasts: tuple = ()
    movingContrasts: tuple = ()
    guideWithPoints: bool = False
    outputs: dict = field(default_factory=dict)
    wanted: tuple = ("forward", "inverse", "warped_moving", "jacobian")
    driveSegments: tuple = ()
    live: bool = False

    def contrasts(self, side):
        """Further volumes of ``fixed`` or ``moving``."""
        return tuple(getattr(self, f"{side}Contrasts"))


def check(request):
    """Everything that can be refused before any work.

    Raises:
        InputError: naming the node and the remedy.
    """
    fixed, moving = request.fixedNode, request.movingNode
    further = (*request.contrasts("fixed"), *request.contrasts("moving"))
    for node, what in ((fixed, _("fixed")), (moving, _("moving"))):
        if node is None or node.GetScene() is None:
            raise InputError(_("No {what} volume is chosen.").format(what=what), _("Choose the two scans to register."))
    if fixed is moving:
        raise InputError(
            _("'{name}' is chosen as fixed and as moving volume.").format(name=fixed.GetName()),
            _("Choose two different scans."),
        )
    checkContrasts(request)
    for node in (fixed, moving, *further):
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
        (request.fixedSlidingMask, request.movingSlidingMask, _("sliding masks")),
    ):
        if (one is None) != (other is None):
            raise InputError(
                _("{what} are chosen for one scan only.").format(what=what.capitalize()),
                _("Choose them for both scans, or for none."),
            )
    _checkPull(request)
    if request.guideWithPoints and request.fixedPoints is None:
        raise InputError(
            _("Landmarks shall guide the alignment, but none are chosen."), _("Choose landmarks of both scans.")
        )
    _checkPoints(request)
    _checkOutputs(request)


def checkContrasts(request):
    """Further contrasts: as many on both sides, scans, none of them twice, and a method that looks at them.

    Raises:
        InputError: naming the node and the remedy.
    """
    fixed, moving, options = request.contrasts("fixed"), request.contrasts("moving"), request.options
    if len(fixed) != len(moving):
        raise InputError(
            _("{a} further contrasts of the fixed and {b} of the moving side are chosen.").format(
                a=len(fixed), b=len(moving)
            ),
            _("They go pair by pair: choose as many on both sides."),
        )
    seen = [request.fixedNode, request.movingNode]
    for k, pair in enumerate(zip(fixed, moving), 2):
        for node in pair:
            if node is None or node.GetScene() is None:
                raise InputError(
                    _("Pair {k} of the contrasts is not complete.").format(k=k),
                    _("Choose a scan of both sides, or take the pair out."),
                )
            if node.GetClassName() != "vtkMRMLScalarVolumeNode":
                raise InputError(
                    _("'{name}' is no scan.").format(name=node.GetName()),
                    _("Choose a volume with one gray value per voxel."),
                )
            if any(node is other for other in seen):
                raise InputError(
                    _("'{name}' is chosen twice.").format(name=node.GetName()),
                    _("Each contrast needs a scan of its own on each side."),
                )
            seen.append(node)
    if not fixed:
        return
    if is_linear(options.method):
        raise InputError(
            _("{method} looks at one contrast a side.").format(method=catalogue.known()[options.method]["title"]),
            _("Choose a method that bends, or take the further contrasts out."),
        )
    if needs_weights(options.method) and not options.refine:
        raise InputError(
            _("The network itself looks at one contrast a side."),
            _("Set Refinement under Method details, or take the further contrasts out."),
        )
    if options.extra_runs:
        raise InputError(
            _("Perturbed runs look at one contrast a side."),
            _("Set Uncertainty runs under Outputs to 1 or Off, or take the further contrasts out."),
        )


def _constant(array):
    """True when every voxel is equal; looks at every eighth slice first, which settles nearly every scan."""
    first = array.flat[0]
    return bool((array[::8, ::4, ::4] == first).all() and (array == first).all())


def _checkPull(request):
    """What shall pull has to be there, and something that bends."""
    if request.options.landmark_weight > 0 and request.fixedPoints is None:
        raise InputError(_("Landmarks shall pull, but none are chosen."), _("Choose landmarks of both scans."))
    if request.driveSegments and request.fixedLabels is None:
        raise InputError(
            _("Structures shall pull, but no segmentations are chosen."), _("Choose segmentations of both scans.")
        )


def _checkPoints(request):
    count = checkPairs(request.fixedPoints, request.movingPoints)
    if request.guideWithPoints and count < 3:
        raise InputError(
            _("{count} landmarks cannot guide the alignment.").format(count=count),
            _("Place at least 3 in both scans."),
        )


def checkPairs(fixedPoints, movingPoints):
    """The number of landmark pairs; 0 when none are given. Raises InputError when the lists do not fit."""
    if fixedPoints is None:
        return 0
    counts = [len(nodes.worldPoints(node)[1]) for node in (fixedPoints, movingPoints)]
    if counts[0] != counts[1]:
        raise InputError(
            _("'{fixed}' has {a} landmarks and '{moving}' has {b}.").format(
                fixed=fixedPoints.GetName(), a=counts[0], moving=movingPoints.GetName(), b=counts[1]
            ),
            _("Both lists need the same landmarks."),
        )
    return counts[0]


def _checkOutputs(request):
    inputs = [
        node
        for node in (
            request.fixedNode,
            request.movingNode,
            *request.contrasts("fixed"),
            *request.contrasts("moving"),
            request.fixedMask,
            request.movingMask,
            request.fixedLabels,
            request.movingLabels,
            request.fixedSlidingMask,
            request.movingSlidingMask,
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


def exportJob(request, folder, further=None):
    """Generator: write all inputs into ``folder`` (:class:`~.exchange.PrivateFolder`); returns the Job.

    Args:
        further: name of the file -> volume of a further contrast, as :func:`.history.named` gives them.

    Raises:
        InputError: an input turned out to be unusable.
    """
    grids, files, options = {}, {}, request.options
    numbers = labelNumbers(request.fixedLabels, request.movingLabels)
    labels = {
        "Labels": ("labels", numbers),
        "SlidingMask": ("sliding_mask", labelNumbers(request.fixedSlidingMask, request.movingSlidingMask)),
    }
    for side, node in (("fixed", request.fixedNode), ("moving", request.movingNode)):
        array, grids[side] = nodes.worldVolume(node)
        files[side] = folder.file(f"{side}.nrrd")
        yield from exchange.writeVolume(files[side], array, grids[side])
        yield from _exportMask(side, request, grids[side], files, folder)
        files[f"{side}_contrasts"] = []
        for contrast in request.contrasts(side):
            name = next(name for name, other in further.items() if other is contrast)
            files[f"{side}_contrasts"].append(folder.file(f"{name}.nrrd"))
            yield from exchange.writeVolume(files[f"{side}_contrasts"][-1], *nodes.worldVolume(contrast))
        for kind, (word, own) in labels.items():
            if (chosen := getattr(request, side + kind)) is not None:
                name = f"{side}_{word}"
                files[name] = yield from exportLabels(chosen, node, folder, name, own[side])
        if (points := getattr(request, f"{side}Points")) is not None:
            files[f"{side}_points"] = yield from exportPoints(points, node, folder, f"{side}_points")
    if request.driveSegments:
        options = dataclasses.replace(options, drive_labels=numbered(request.driveSegments, numbers["fixed"]))
    if request.initialTransform is not None:
        options = _withStart(options, request, folder)
    return Job(
        output=folder.file("result"),
        report=False,
        guide_with_points=request.guideWithPoints,
        keep_state=True,
        options=options,
        **files,
    )


def labelNumbers(fixed, moving):
    """Which number each structure gets in the files: ``{"fixed": {name: number}, "moving": {name: number}}``.

    Two segmentations that share names of segments are matched by these names, others by the order of their segments;
    None for a side that is a label map, whose labels are numbers already, or that is not given.
    """
    names = [None if node is None else nodes.segmentNames(node) for node in (fixed, moving)]
    if None in names or not set(names[0]) & set(names[1]) or any(len(set(own)) < len(own) for own in names):
        return {
            side: None if own is None else {name: k for k, name in enumerate(own, start=1)}
            for side, own in zip(("fixed", "moving"), names)
        }
    first = {name: k for k, name in enumerate(names[0], start=1)}
    others = [name for name in names[1] if name not in first]
    later = {name: len(first) + k for k, name in enumerate(others, start=1)}
    return {"fixed": first, "moving": {name: {**first, **later}[name] for name in names[1]}}


def numbered(chosen, numbers):
    """Names of structures as the library's list of numbers.

    Raises:
        InputError: one of them is not there.
    """
    if tuple(chosen) == ("all",):
        return "all"
    lost = [name for name in chosen if numbers is not None and name not in numbers]
    if lost:
        raise InputError(
            _("Segment '{name}' shall pull, but the fixed segmentation has none of this name.").format(name=lost[0]),
            _("Choose the structures that pull again."),
        )
    return ",".join(name if numbers is None else str(numbers[name]) for name in chosen)


def givenNames(request):
    """What people call the labels and points of a request: ``{"labels": {number: name}, "points": [name, ...]}``."""
    numbers = labelNumbers(request.fixedLabels, request.movingLabels)
    found = {str(k): name for side in ("moving", "fixed") for name, k in (numbers[side] or {}).items()}
    points = [] if request.fixedPoints is None else nodes.worldPoints(request.fixedPoints)[1]
    return {"labels": found, "points": list(points)}


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


def exportLabels(node, volumeNode, folder, name, numbers=None):
    """Generator: a label map or segmentation as file; returns its path.

    Args:
        numbers: name -> number of the segments; None = 1, 2, ... in their order, or a label map's own.
    """
    array, grid = nodes.worldLabels(node, volumeNode)
    yield
    names = nodes.segmentNames(node)
    if names and numbers and list(numbers.values()) != list(range(1, len(names) + 1)):
        array = np.array([0, *(numbers[name] for name in names)], array.dtype)[array]
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
