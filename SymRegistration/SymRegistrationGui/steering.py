"""Going on from a finished registration: an update, a repair, a step back or forth. Steps for
:class:`~.logic.RegistrationLogic`; the worker decides everything."""

import re
from dataclasses import dataclass, field

import numpy as np
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError

from . import exchange, exporting, history, nodes, runs


@dataclass
class Change:
    """What an update or a repair asks for; what is None stays as it was in the last step.

    Attributes:
        fixedPoints, movingPoints: markups with the pairs.
        fixedLabels, movingLabels: segmentations or label maps.
        region: where to repair: a segmentation, a label map, or a ROI, on the fixed scan.
        segment: name of the one segment of ``region`` to take; "" = all.
        center, radius: the same as a sphere, world mm as in :func:`.results.places`.
        rim: mm around the region over which the change fades out.
        driveSegments: as in :class:`~.exporting.Request`.
        options: fields of :class:`SymRegistrationLib.job.Options` that differ.
        live: tell of each level of the optimizer.
    """

    fixedPoints: object = None
    movingPoints: object = None
    fixedLabels: object = None
    movingLabels: object = None
    region: object = None
    segment: str = ""
    center: tuple | None = None
    radius: float = 15.0
    rim: float = 10.0
    driveSegments: tuple = ()
    options: dict = field(default_factory=dict)
    live: bool = False

    @property
    def repairs(self):
        return self.region is not None or self.center is not None


def check(run, change=None):
    """Everything that can be refused before any work.

    Raises:
        InputError: naming what is missing.
    """
    if run is None or run.table.GetScene() is None:
        raise InputError(_("There is no registration to go on from."), _("Register first."))
    words = {"fixed": _("fixed scan"), "moving": _("moving scan")}
    contrasts = history.further(run, (history.steps(run)[0],))
    for part, node in {"fixed": run.node("fixed"), "moving": run.node("moving"), **contrasts}.items():
        if node is None:
            raise InputError(
                _("The {part} of '{name}' was deleted.").format(
                    part=words.get(part) or _("scan of a further contrast"), name=run.table.GetName()
                ),
                _("Its result stays as it is; load the scan and register again to go on."),
            )
    if history.of(run) is None:
        raise InputError(
            _("'{name}' was made without its steps.").format(name=run.table.GetName()), _("Register again.")
        )
    if change is None:
        return
    for one, other, what in (
        (change.fixedPoints, change.movingPoints, _("Landmarks")),
        (change.fixedLabels, change.movingLabels, _("Segmentations")),
    ):
        if (one is None) != (other is None):
            raise InputError(
                _("{what} are chosen for one scan only.").format(what=what), _("Choose them for both scans.")
            )
    exporting.checkPairs(change.fixedPoints, change.movingPoints)


def goOn(run, change, folder, ask):
    """Generator: update or repair ``run``; returns the worker's metrics.

    Args:
        ask: generator ``ask(command, fields)`` that asks the worker.
    """
    yield from _lay(run, folder, (history.steps(run)[0],))
    changes, options = {"report": False}, dict(change.options)
    fixed, moving = run.node("fixed"), run.node("moving")
    if change.fixedPoints is not None:
        for side, node in (("fixed", change.fixedPoints), ("moving", change.movingPoints)):
            changes[f"{side}_points"] = yield from exporting.exportPoints(node, None, folder, f"{side}_points")
    if change.fixedLabels is not None:
        numbers = exporting.labelNumbers(change.fixedLabels, change.movingLabels)
        for side, node, volume in (("fixed", change.fixedLabels, fixed), ("moving", change.movingLabels, moving)):
            name = f"{side}_labels"
            changes[name] = yield from exporting.exportLabels(node, volume, folder, name, numbers[side])
        if change.driveSegments:
            options["drive_labels"] = exporting.numbered(change.driveSegments, numbers["fixed"])
    if change.center is not None:
        x, y, z = nodes.rasFromLps(change.center)
        changes["sphere"] = ",".join(repr(float(value)) for value in (x, y, z, change.radius))
    elif change.region is not None:
        changes["region"] = yield from _exportRegion(change, fixed, folder)
    if change.repairs:
        changes["rim_mm"] = float(change.rim)
    wanted = [part for part in runs.PARTS if run.node(part) is not None]
    fields = {"folder": folder.file("result"), "changes": changes, "options": options, "outputs": wanted}
    return (yield from ask("continue", {**fields, "live": change.live}))


def move(run, command, folder, ask, wanted=None):
    """Generator: ``undo`` or ``redo``; returns the worker's metrics of the step that is shown then.

    Args:
        wanted: parts to make; None = those that the run has.
    """
    current, known = history.steps(run)
    target = current + (1 if command == "redo" else -1)
    yield from _lay(run, folder, [target] if 1 <= target <= len(known) else ())
    wanted = wanted or [part for part in runs.PARTS if run.node(part) is not None]
    return (yield from ask(command, {"folder": folder.file("result"), "outputs": wanted}))


def _lay(run, folder, states):
    """Generator: the scans as they are now, and the steps, in ``folder``."""
    yield from history.layScans(run, folder, states)
    yield from history.lay(run, folder, states)


def _exportRegion(change, fixedNode, folder):
    """Generator: the region as a mask file; returns its path."""
    path, region = folder.file("region.nrrd"), change.region
    if region.IsA("vtkMRMLMarkupsROINode"):
        grid = nodes.worldVolume(fixedNode)[1]
        array = yield from nodes.roiMask(region, grid)
    else:
        array, grid = nodes.worldLabels(region, fixedNode)
        yield
        names = nodes.segmentNames(region)
        if change.segment and names:
            if change.segment not in names:
                raise InputError(
                    _("'{node}' has no segment '{name}'.").format(node=region.GetName(), name=change.segment),
                    _("Choose another segment."),
                )
            array = array == names.index(change.segment) + 1
        array = (array != 0).astype(np.uint8)
        yield
    if not array.any():
        raise InputError(
            _("The region '{name}' is empty.").format(name=region.GetName()),
            _("Paint the place that shall be repaired."),
        )
    yield from exchange.writeVolume(path, array, grid)
    return path


def inWords(text, named):
    """A worker's message that names the nodes, not the files that stood for them; ``named``: name of file -> node."""
    for name, node in named.items():
        if node is not None:
            text = re.sub(rf"'[^']*\b{name}\.nrrd'", lambda found, word=node.GetName(): f"'{word}'", text)
    return text
