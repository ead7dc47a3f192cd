"""A registration from click to nodes, without any widget: export, worker, import, all in short steps on
the main thread.
"""

import dataclasses
import logging
import shutil
import time
import traceback
from functools import partial

import slicer
import vtk
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError, RegistrationError

from . import exchange, exporting, history, importing, nodes, runs, steering
from .client import WorkerClient, WorkerError
from .steps import PAUSE, StepRunner


class Task:
    """Something under way; the call-backs may be replaced before it ends.

    Attributes:
        onProgress: ``(stage, fraction, secondsLeft or None, message)``.
        onDone: gets the result.
        onFailed: gets an exception with ``message`` and ``hint``.
        onLevel: gets what the worker tells after each level of the optimizer, when it was asked to be live.
    """

    def __init__(self, onProgress=None, onDone=None, onFailed=None):
        self.onProgress = onProgress or (lambda *arguments: None)
        self.onDone = onDone or (lambda result: None)
        self.onFailed = onFailed or (lambda error: None)
        self.onLevel = lambda event: None
        self.folder = None
        self.finished = False
        self.result = None
        self.error = None


class RegistrationLogic:
    """Runs registrations, one at a time, in the worker that it keeps warm.

    Args:
        scene: the vtkMRMLScene.
        client: a :class:`~.client.WorkerClient`; made when missing.
    """

    def __init__(self, scene, client=None):
        self.scene = scene
        self.client = client or WorkerClient()
        self._steps = StepRunner()
        self._task = None
        self._leftFolders = []
        self._observed = []
        self._named = {}

    @property
    def busy(self):
        return self._task is not None

    def register(self, request, task=None):
        """Start a registration; refuses at once what can be refused at once.

        Raises:
            InputError: see :func:`.exporting.check`.
            RegistrationError: something is under way already.
        """
        self._requireIdle()
        exporting.check(request)
        contrasts = (*request.contrasts("fixed"), *request.contrasts("moving"))
        task = self._begin(task, (request.fixedNode, request.movingNode, *contrasts, *request.outputs.values()))
        task.onProgress("export", 0.0, None, _("Handing over the scans"))
        table = request.outputs.get("table")
        before = runs.Run(table) if runs.isResultTable(table) else None
        further = history.named(before, contrasts)
        self._named = {"fixed": request.fixedNode, "moving": request.movingNode, **further}
        self._run(self._registerSteps(request, before, further), self._imported)
        return task

    def _registerSteps(self, request, before, further):
        """Generator: from the nodes to the files, through the worker, and back; returns the Run."""
        folder = self._task.folder
        if before is not None:
            try:
                yield from history.lay(before, folder)
            except InputError:  # a part of it is gone: this registration begins a new one
                shutil.rmtree(folder.file("result"), ignore_errors=True)
        names = exporting.givenNames(request)
        job = yield from exporting.exportJob(request, folder, further)
        fields = {"job": dataclasses.asdict(job), "outputs": list(request.wanted), "live": request.live}
        metrics = yield from self._ask("register", fields)
        scans = {"fixed": request.fixedNode, "moving": request.movingNode, **further}
        return (yield from self._importSteps(scans, request.outputs, metrics, names))

    def _importSteps(self, scans, outputs, metrics, names=None):
        """Generator: the result into the scene; returns the Run."""
        self._task.onProgress("import", 1.0, None, _("Loading the result"))
        yield
        return (yield from importing.importSteps(self._task.folder, scans, outputs, metrics, names))

    # ------------------------------------------------------------------------------------------ going on

    def change(self, run, change, task=None):
        """Update or repair a run; see :class:`~.steering.Change`. The result of the task is the same run.

        Raises:
            InputError: see :func:`.steering.check`. RegistrationError: something is under way already.
        """
        self._requireIdle()
        steering.check(run, change)
        given = (change.fixedPoints, change.movingPoints, change.fixedLabels, change.movingLabels, change.region)
        names = {**(run.metrics.get("job") or {}).get("names", {}), **_givenBy(change)}
        return self._goOn(run, task, given, names, partial(steering.goOn, run, change))

    def undo(self, run, task=None):
        """Show the step before of a run again; nothing is optimized. Raises as :meth:`change`."""
        return self._move(run, "undo", task)

    def redo(self, run, task=None):
        """Show the step again that was undone last. Raises as :meth:`change`."""
        return self._move(run, "redo", task)

    def fetchPrevious(self, run, task=None):
        """Make the registered scan of the step before again, to be compared; the run itself stays. Raises as
        :meth:`change`."""
        self._requireIdle()
        steering.check(run)
        task = self._begin(task, (run.node("fixed"), run.node("moving"), run.table))

        def steps():
            metrics = yield from steering.move(run, "undo", task.folder, self._ask, ["warped_moving"])
            yield from importing.rememberSteps(run, task.folder.file(f"result/{metrics['files']['warped_moving']}"))

        self._run(steps(), self._finish)
        return task

    def _move(self, run, command, task):
        self._requireIdle()
        steering.check(run)
        names = (run.metrics.get("job") or {}).get("names", {})
        return self._goOn(run, task, (), names, partial(steering.move, run, command))

    def _goOn(self, run, task, given, names, steps):
        fixed, moving = run.node("fixed"), run.node("moving")
        outputs = {part: run.node(part) for part in runs.PARTS if run.node(part) is not None}
        outputs["table"] = run.table
        task = self._begin(task, (fixed, moving, *outputs.values(), *given))
        task.onProgress("export", 0.0, None, _("Handing over the scans"))
        scans = {"fixed": fixed, "moving": moving}
        self._named = {**scans, **history.further(run, (history.steps(run)[0],))}

        def whole():
            metrics = yield from steps(task.folder, self._ask)
            return (yield from self._importSteps(scans, outputs, metrics, names))

        self._run(whole(), self._imported)
        return task

    def enough(self):
        """The optimizer may stop where it is: the task ends with a complete, valid result."""
        if self.busy and self.client.busy:
            self.client.request("enough", {}, lambda result: None, lambda error: None)

    def _imported(self, run):
        folder = self._task.folder
        self._task.folder = None
        try:
            self._finish(run)
        finally:  # whoever is told may fail; the folder has to go all the same
            self._fetchReport(run, folder)

    def _fetchReport(self, run, folder):
        """The report is made after the nodes are there: nobody waits for its pictures."""
        self._leftFolders.append(folder)
        path = folder.file("report.html")

        def done(result):
            if run.table.GetScene() is not None:
                with open(path, encoding="utf-8") as file:
                    run.setText("report", file.read())
            self._dropFolder(folder)

        self.client.request("report", {"arguments": {"path": path}}, done, lambda error: self._dropFolder(folder))

    def _dropFolder(self, folder):
        folder.remove()
        self._leftFolders = [other for other in self._leftFolders if other is not folder]

    # ------------------------------------------------------------------------------------------ using a result

    def apply(self, run, toMove, fromMoving=True, task=None):
        """Carry other nodes along: markups, models, segmentations and volumes of one scan to the other one.

        Args:
            run: the :class:`~.runs.Run`.
            toMove: nodes that belong to the moving (else to the fixed) scan.

        The result of the task is the list of new nodes.
        """
        from .applying import applySteps

        self._requireIdle()
        task = self._begin(task, (run.table, *toMove))
        self._run(applySteps(run, toMove, fromMoving, task.folder, self._askAbout), self._finish)
        return task

    def evaluate(self, run, labels=(None, None), points=(None, None), task=None):
        """Dice of label maps or segmentations (fixed, moving), landmark error of markups; the result is
        the new metrics.
        """
        from .applying import evaluateSteps

        self._requireIdle()
        task = self._begin(task, (run.table, *labels, *points))
        self._run(evaluateSteps(run, labels, points, task.folder, self._askAbout), self._finish)
        return task

    def _askAbout(self, command, arguments):
        """Generator: as :meth:`_ask`, for commands that take ``arguments``."""
        return (yield from self._ask(command, {"arguments": arguments}))

    def _ask(self, command, fields):
        """Generator: one worker request; waits without doing anything and returns the result."""
        task, answer = self._task, []
        started = time.perf_counter()

        def answered(result, error):
            answer.append((result, error))
            self._steps.resume()

        self.client.request(
            command,
            fields,
            lambda result: answered(result, None),
            lambda error: answered(None, error),
            lambda event: task.onProgress(
                event["stage"], event["fraction"], event.get("seconds_left"), event["message"]
            ),
            lambda event: task.onLevel(event),
        )
        while not answer:
            yield PAUSE
        result, error = answer[0]
        if error is not None:
            raise error
        if isinstance(result, dict) and "seconds" in result:
            result["seconds"]["worker"] = round(time.perf_counter() - started, 3)
        return result

    def suggest(self, fixedNode, movingNode, task=None):
        """Which preset by anatomy suits two scans; the result is what the library says: preset, title, reason."""
        self._requireIdle()
        exporting.check(exporting.Request(fixedNode, movingNode))
        task = self._begin(task, (fixedNode, movingNode))
        self._named = {"fixed": fixedNode, "moving": movingNode}

        def steps():
            paths = {}
            for side, node in (("fixed", fixedNode), ("moving", movingNode)):
                paths[side] = task.folder.file(f"{side}.nrrd")
                yield from exchange.writeVolume(paths[side], *nodes.worldVolume(node))
            return (yield from self._ask("suggest", paths))

        self._run(steps(), self._finish)
        return task

    def saveSteps(self, run, path, task=None):
        """Write the steps of a run with its scans into a folder, for the command line; the result is the path of the
        history."""
        self._requireIdle()
        steering.check(run)
        task = self._begin(task, (run.table,))
        self._run(history.exportSteps(run, path), self._finish)
        return task

    # ------------------------------------------------------------------------------------------ the way of a task

    def _requireIdle(self):
        if self.busy:
            raise RegistrationError(_("Another registration is under way."), _("Wait for it, or cancel it."))

    def _begin(self, task, needed):
        self._task = task or Task()
        self._task.folder = exchange.PrivateFolder()
        self._watch([node for node in needed if node is not None])
        return self._task

    def _run(self, steps, onDone):
        self._steps.start(steps, onDone, self._failed)

    def _finish(self, result):
        task = self._end()
        task.result, task.finished = result, True
        task.onDone(result)

    def _failed(self, error):
        if self._task is None:
            return
        if not isinstance(error, (RegistrationError, WorkerError)):
            logging.getLogger("SymRegistration").error(
                "".join(traceback.format_exception(type(error), error, error.__traceback__))
            )
            error = RegistrationError(
                _("The result could not be used ({error}).").format(error=error), _("The log has the details.")
            )
        error.message = steering.inWords(error.message, self._named)
        self._named = {}
        task = self._end()
        task.error, task.finished = error, True
        task.onFailed(error)

    def _end(self):
        task, self._task = self._task, None
        self._unwatch()
        if task.folder is not None:
            task.folder.remove()
        return task

    def cancel(self, message=None):
        """Give up what is under way: the worker ends with all it started, files vanish, the scene is as before."""
        if self._task is None:
            return
        self._steps.cancel()
        self.client.cancel()
        for folder in list(self._leftFolders):
            self._dropFolder(folder)
        self._failed(RegistrationError(message or _("Canceled.")))

    def close(self):
        """End everything; for the end of the application."""
        self.cancel()
        self.client.stop()
        for folder in list(self._leftFolders):
            self._dropFolder(folder)

    def wait(self, task):
        """Process events until ``task`` has finished; returns its result, raises its error."""
        while not task.finished:
            slicer.app.processEvents()
            time.sleep(0.002)
        if task.error is not None:
            raise task.error
        return task.result

    # ---------------------------------------------------------------------------------------- what may happen meanwhile

    def _watch(self, needed):
        """A closed scene, or a deleted node that is needed, ends the task."""

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def removed(caller, event, node):
            if any(node is other for other in needed):
                self.cancel(
                    _("'{name}' was deleted during the registration, which was given up.").format(name=node.GetName())
                )

        def closing(caller, event):
            self.cancel(_("The scene was closed during the registration, which was given up."))

        events = slicer.vtkMRMLScene
        self._observed = [
            self.scene.AddObserver(events.NodeAboutToBeRemovedEvent, removed),
            self.scene.AddObserver(events.StartCloseEvent, closing),
        ]

    def _unwatch(self):
        for tag in self._observed:
            self.scene.RemoveObserver(tag)
        self._observed = []


def _givenBy(change):
    """Names of what a change brings along, as :func:`.exporting.givenNames`; {} for what stays."""
    told = exporting.givenNames(change)
    return {
        key: told[key]
        for key, node in (("labels", change.fixedLabels), ("points", change.fixedPoints))
        if node is not None
    }
