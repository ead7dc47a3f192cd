"""A registration from click to nodes, without any widget: export, worker, import, all in short steps on
the main thread.
"""

import dataclasses
import logging
import time
import traceback
from functools import partial

import slicer
import vtk
from slicer.i18n import tr as _

from SymRegistrationLib.job import RegistrationError

from . import exchange, exporting, nodes, runs
from .client import WorkerClient, WorkerError
from .steps import StepRunner


class Task:
    """Something under way; the call-backs may be replaced before it ends.

    Attributes:
        onProgress: ``(stage, fraction, secondsLeft or None, message)``.
        onDone: gets the result.
        onFailed: gets an exception with ``message`` and ``hint``.
    """

    def __init__(self, onProgress=None, onDone=None, onFailed=None):
        self.onProgress = onProgress or (lambda *arguments: None)
        self.onDone = onDone or (lambda result: None)
        self.onFailed = onFailed or (lambda error: None)
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
        task = self._begin(task, (request.fixedNode, request.movingNode, *request.outputs.values()))
        task.onProgress("export", 0.0, None, _("Handing over the scans"))
        self._run(exporting.exportJob(request, task.folder), partial(self._send, request))
        return task

    def _send(self, request, job):
        task, wanted = self._task, list(request.wanted)
        started = time.perf_counter()

        def progress(event):
            task.onProgress(event["stage"], event["fraction"], event.get("seconds_left"), event["message"])

        def result(metrics):
            metrics["seconds"]["worker"] = round(time.perf_counter() - started, 3)
            task.onProgress("import", 1.0, None, _("Loading the result"))
            self._run(self._import(request, metrics), self._imported)

        self.client.request(
            "register", {"job": dataclasses.asdict(job), "outputs": wanted}, result, self._failed, progress
        )

    def _import(self, request, metrics):
        """Generator: the result files into nodes; returns the Run. The scene changes in one step, at the end."""
        fillers = {}
        for part, name in metrics["files"].items():
            if part in runs.PARTS:
                transform = part in runs.TRANSFORMS
                read, make = (
                    (exchange.readTransform, nodes.gridTransformFiller)
                    if transform
                    else (exchange.readVolume, nodes.volumeFiller)
                )
                fillers[part] = yield from make(*(yield from read(self._task.folder.file(f"result/{name}"))))
        metrics["job"]["names"] = {"fixed": request.fixedNode.GetName(), "moving": request.movingNode.GetName()}
        run = runs.commit(request.fixedNode, request.movingNode, fillers, request.outputs, metrics)
        yield
        return run

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
        self._run(applySteps(run, toMove, fromMoving, task.folder, self._ask), self._finish)
        return task

    def evaluate(self, run, labels=(None, None), points=(None, None), task=None):
        """Dice of label maps or segmentations (fixed, moving), landmark error of markups; the result is
        the new metrics.
        """
        from .applying import evaluateSteps

        self._requireIdle()
        task = self._begin(task, (run.table, *labels, *points))
        self._run(evaluateSteps(run, labels, points, task.folder, self._ask), self._finish)
        return task

    def _ask(self, command, arguments):
        """Generator: one worker request; waits without blocking and returns the result."""
        task, answer = self._task, []
        self.client.request(
            command,
            {"arguments": arguments},
            lambda result: answer.append((result, None)),
            lambda error: answer.append((None, error)),
            lambda event: task.onProgress(
                event["stage"], event["fraction"], event.get("seconds_left"), event["message"]
            ),
        )
        while not answer:
            time.sleep(0.001)
            yield
        result, error = answer[0]
        if error is not None:
            raise error
        return result

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
