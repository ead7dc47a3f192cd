"""What scripts call: ``SymRegistrationLogic().register(...)``, ``align``, ``update``, ``repair``, ``undo``, ``redo``.

Every result is a dictionary of nodes with the results table (``"table"``) in it; the table is also how a later call
names the registration to go on from. Its steps are saved with the scene.
"""

from SymRegistrationLib.job import Options, numbers

from . import history, posing, results, steering
from .exporting import Request
from .logic import Task
from .runs import PARTS, Run


class Scripting:
    """The calls; ``engine`` is a :class:`~.logic.RegistrationLogic`.

    All of them take ``wait`` (process events until the result is there; else return a Task at once) and ``onDone``
    (called with the :class:`~.runs.Run`), and raise InputError, RegistrationError or WorkerError, which say in words
    what went wrong. Then the scene, and the result that there was, are as before.
    """

    engine = None

    def register(
        self,
        fixedNode,
        movingNode,
        method="syn",
        wait=True,
        onDone=None,
        inputs=None,
        table=None,
        fixedContrasts=(),
        movingContrasts=(),
        **options,
    ):
        """Register two volume nodes.

        Args:
            fixedNode, movingNode: volumes.
            method: a name that the module lists; ``rigid``, ``similarity`` and ``affine`` do not bend.
            inputs: further fields of :class:`~SymRegistrationGui.exporting.Request`, e.g. ``{"fixedMask": node}``, or
                ``{"initialTransform": node}`` for a linear transform to start from.
            table: of a registration of these scans: its nodes are updated, and this becomes its next step.
            fixedContrasts, movingContrasts: further volumes of the two sides, pair by pair (T2 with T2), each where the
                scan of its side lies; ``contrast_weights="1,0.5"`` says how much each pair counts, the scans first.
            **options: of :class:`SymRegistrationLib.job.Options`, e.g. ``preset="fast"``.

        Returns:
            With ``wait``, a dictionary of nodes: forward, inverse, warped_moving, jacobian, table; else a Task.
        """
        given = {"fixedContrasts": tuple(fixedContrasts), "movingContrasts": tuple(movingContrasts), **(inputs or {})}
        request = Request(fixedNode, movingNode, Options(method=method, **options), **given)
        if table is not None and not request.outputs:
            request.outputs = _nodesOf(Run(table))
        return self._started(lambda task: self.engine.register(request, task), wait, onDone)

    def align(
        self,
        fixedNode,
        movingNode,
        kind="rigid",
        start=None,
        wait=True,
        onDone=None,
        inputs=None,
        table=None,
        **options,
    ):
        """Find the pose of the moving scan; nothing bends.

        Args:
            kind: ``rigid``, ``similarity`` or ``affine``.
            start: a linear transform node that lays the moving scan near the fixed one: the pose is refined from there.

        Returns:
            As :meth:`register`, and ``pose``: a linear transform node with the pose, which may be turned and shifted
            and be the ``start`` of the next alignment, or ``inputs={"initialTransform": pose}`` of a registration.
        """
        given = {**(inputs or {}), **({} if start is None else {"initialTransform": start})}

        def done(run):
            posing.setPose(run)
            if onDone is not None:
                onDone(run)

        return self.register(fixedNode, movingNode, kind, wait, done, given, table, **options)

    def update(self, table, wait=True, onDone=None, **given):
        """Go on from a finished registration: landmarks and structures pull, the rest follows.

        Args:
            table: the results table of the registration.
            **given: fields of :class:`~SymRegistrationGui.steering.Change` (``fixedPoints``, ``movingPoints``,
                ``fixedLabels``, ``movingLabels``, ``driveSegments``) and options of
                :class:`SymRegistrationLib.job.Options` (``landmark_tolerance=1.5``). Points pull with weight 1 unless
                ``landmark_weight`` says otherwise, and all shared structures unless ``driveSegments`` names some.
        """
        change = _change(given)
        if change.fixedPoints is not None:
            change.options.setdefault("landmark_weight", 1.0)
        if change.fixedLabels is not None and not change.driveSegments:
            change.driveSegments = ("all",)
        return self._started(lambda task: self.engine.change(Run(table), change, task), wait, onDone)

    def repair(self, table, region=None, sphere=None, wait=True, onDone=None, **given):
        """Register again in one region of a finished registration; beyond its rim nothing changes.

        Args:
            region: segmentation, label map or ROI node on the fixed scan.
            sphere: instead of it ``(right, anterior, superior, radius)`` in mm, as Slicer shows places.
            **given: as for :meth:`update`; also ``rim`` (mm) and ``segment`` (name of one segment of ``region``), and
                options like ``stiffness=2``, ``similarity="mind"``, ``spacing=1.0``.
        """
        if sphere is not None:
            given |= {"center": tuple(sphere[:3]), "radius": sphere[3]}
        change = _change({"region": region, **given})
        return self._started(lambda task: self.engine.change(Run(table), change, task), wait, onDone)

    def undo(self, table, wait=True, onDone=None):
        """Show the step before again; nothing is optimized."""
        return self._started(lambda task: self.engine.undo(Run(table), task), wait, onDone)

    def redo(self, table, wait=True, onDone=None):
        """Show the step again that was undone last."""
        return self._started(lambda task: self.engine.redo(Run(table), task), wait, onDone)

    def history(self, table):
        """(number of the step that is shown, list of all steps as plain data: number, step, job, numbers, time)."""
        return history.steps(Run(table))

    def saveSteps(self, table, path):
        """Write the steps and the scans into a folder; returns the path for ``symreg register --job``."""
        return self.engine.wait(self.engine.saveSteps(Run(table), path))

    def _started(self, start, wait, onDone):
        def done(run):
            results.fillTable(run.table, run.metrics)
            if onDone is not None:
                onDone(run)

        task = start(Task(onDone=done))
        if not wait:
            return task
        run = self.engine.wait(task)
        pose = {} if run.node("pose") is None else {"pose": run.node("pose")}
        return {**_nodesOf(run), **pose}


def _nodesOf(run):
    return {**{part: run.node(part) for part in PARTS if run.node(part) is not None}, "table": run.table}


def _change(given):
    """A :class:`~.steering.Change` from its fields and from options of the library."""
    fields = {name: value for name, value in given.items() if name in steering.Change.__dataclass_fields__}
    options = {name: value for name, value in given.items() if name not in fields}
    if "landmark_tolerance" in options:
        numbers(options["landmark_tolerance"], "landmark_tolerance")
    Options(**options)  # refuses what is not known or not allowed
    return steering.Change(**{**fields, "options": options})
