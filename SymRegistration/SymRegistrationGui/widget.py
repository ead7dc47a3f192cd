"""The module panel: connects the .ui file to the state and to the logic. It computes nothing."""

import time

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError, RegistrationError

from . import install, methods, parameters, sampledata
from .logic import Task
from .resultspanel import ResultsPanel

#: Combo box -> the parameter it shows; filled by code, because texts are translated and values are not.
COMBOS = {"methodComboBox": "method", "presetComboBox": "preset", "metricComboBox": "metric", "initialComboBox": "initial",
          "deviceComboBox": "device"}


class Panel:
    """Everything between the widgets and :class:`~.logic.RegistrationLogic`.

    Args:
        ui: child widgets by name.
        logic: the logic of the module.
    """

    def __init__(self, ui, logic):
        self.ui = ui
        self.logic = logic
        self.parameters = None
        self._guiTag = self._nodeTag = None
        self._updating = False
        self._hint = ""
        self._started = 0.0
        logic.client.onLog = self.log
        logic.client.onDevices = self._showDevices
        self.results = ResultsPanel(ui, logic, self)
        self._methods = {method["name"]: method for method in methods.methods()}
        self._fillCombos()
        self._connect()
        self._clock = qt.QTimer()
        self._clock.interval = 1000
        self._clock.timeout.connect(self._showTime)
        self._lastProgress = None

    def _fillCombos(self):
        ui = self.ui
        for method in self._methods.values():
            missing = "" if methods.usable(method) else _(" (needs weights)")
            ui.methodComboBox.addItem(method["title"] + missing, method["name"])
        for combo, pairs in ((ui.presetComboBox, methods.presets()), (ui.metricComboBox, methods.metrics()),
                             (ui.initialComboBox, methods.initials()), (ui.deviceComboBox, methods.devices([]))):
            for value, text in pairs:
                combo.addItem(text, value)

    def _connect(self):
        ui = self.ui
        for name, parameter in COMBOS.items():
            combo = getattr(ui, name)
            combo.currentIndexChanged.connect(lambda *_unused, c=combo, p=parameter: self._choose(p, c.itemData(c.currentIndex)))
        ui.weightsPathEdit.currentPathChanged.connect(lambda *_unused: self._choose("weights", ui.weightsPathEdit.currentPath))
        ui.registerButton.clicked.connect(self.onRegister)
        ui.cancelButton.clicked.connect(self.onCancel)
        ui.swapButton.clicked.connect(self.onSwap)
        ui.tryItButton.clicked.connect(self.onTryIt)
        ui.devicesButton.clicked.connect(self.onDevices)

    # ------------------------------------------------------------------------------------------ state

    def setParameters(self, wrapped):
        """Show another parameter node, or None while a scene closes."""
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.parameters.RemoveObserver(self._nodeTag)
        self.parameters = wrapped
        if wrapped is not None:
            self._guiTag = wrapped.connectGui(self.ui)
            self._nodeTag = wrapped.AddObserver(vtk.vtkCommand.ModifiedEvent, self._parametersChanged)
            self._guessVolumes()
        self.update()

    def _guessVolumes(self):
        """With exactly two scans in the scene there is nothing to choose."""
        state = self.parameters
        volumes = [slicer.mrmlScene.GetNthNodeByClass(k, "vtkMRMLScalarVolumeNode")
                   for k in range(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode"))]
        if state.fixedVolume is None and state.movingVolume is None and len(volumes) == 2:
            state.fixedVolume, state.movingVolume = volumes

    def _choose(self, name, value):
        if self.parameters is not None and not self._updating and value is not None:
            setattr(self.parameters, name, value)

    def _parametersChanged(self, caller=None, event=None):
        self.update()

    def update(self):
        """Bring every widget in line with the state."""
        if self._updating:
            return
        self._updating = True
        try:
            if self.parameters is not None:
                self._showState()
            self._showButtons()
        finally:
            self._updating = False
        self.results.update()

    def _showState(self):
        ui, state = self.ui, self.parameters
        for name, parameter in COMBOS.items():
            combo = getattr(ui, name)
            index = combo.findData(getattr(state, parameter))
            if index >= 0 and index != combo.currentIndex:
                combo.currentIndex = index
        if ui.weightsPathEdit.currentPath != state.weights:
            ui.weightsPathEdit.currentPath = state.weights
        method = self._methods.get(state.method)
        if method is not None:
            ui.methodDescriptionLabel.text = f"{method['description']}<br><small>{method['publication']}</small>"
        network = state.method != "syn"
        for widget in (ui.refineLabel, ui.refineSpinBox, ui.weightsLabel, ui.weightsPathEdit):
            widget.visible = network
        for widget in (ui.presetLabel, ui.presetComboBox, ui.metricLabel, ui.metricComboBox):
            widget.enabled = not network or state.refine > 0
        for widget in (ui.initialTransformLabel, ui.initialTransformSelector):
            widget.visible = state.initial == "transform"
        ui.guideCheckBox.enabled = state.fixedLandmarks is not None and state.movingLandmarks is not None
        for switch, selector in (("makeWarpedMoving", ui.outputWarpedMovingSelector), ("makeWarpedFixed", ui.outputWarpedFixedSelector),
                                 ("makeJacobian", ui.outputJacobianSelector), ("makeConsistency", ui.outputConsistencySelector)):
            selector.enabled = getattr(state, switch)
        ui.outputUncertaintySelector.enabled = state.uncertaintyRuns > 0

    def _showButtons(self):
        ui, busy = self.ui, self.logic.busy
        problem = self.problem()
        ui.registerButton.enabled = not busy and not problem
        ui.registerButton.toolTip = problem or _("Register the moving scan to the fixed one, and the other way round.")
        if not busy and (problem or ui.statusLabel.text == self._hint):
            self.status(problem)
        self._hint = problem
        ui.cancelButton.enabled = busy
        for section in (ui.inputsCollapsibleButton, ui.methodCollapsibleButton, ui.advancedCollapsibleButton, ui.outputsCollapsibleButton):
            section.enabled = not busy
        ui.progressBar.visible = busy

    def problem(self):
        """Why Register cannot be pressed now, "" when it can."""
        state = self.parameters
        if state is None or state.fixedVolume is None or state.movingVolume is None:
            return _("Choose a fixed and a moving volume.")
        if state.fixedVolume is state.movingVolume:
            return _("Choose two different volumes.")
        if state.initial == "transform" and state.initialTransform is None:
            return _("Choose the start transform, or another start.")
        method = self._methods.get(state.method)
        if method is None:
            return _("Choose a method.")
        if not methods.usable(method, state.weights):
            return _("{method} needs trained weights: choose a weights file, or take the SyN optimizer.").format(method=method["title"])
        return ""

    # ------------------------------------------------------------------------------------------ actions

    def onRegister(self, *_unused):
        self.register()

    def register(self, repair=False):
        """What the Register button does."""
        try:
            request = parameters.request(self.parameters)
            if not install.ensure(self.logic.client, repair):
                self.status(_("Nothing was installed; the registration was not started."))
                return
            self._watch(self.logic.register(request, Task(onDone=self._registered)))
        except (InputError, RegistrationError, install.InstallError) as error:
            self.fail(error)
        self.update()

    def _registered(self, run):
        from . import results

        metrics = run.metrics
        results.fillTable(run.table, metrics)
        parameters.rememberOutputs(self.parameters, run)
        seconds = time.perf_counter() - self._started
        self._ended(_("Done in {seconds:.1f} s. {words}").format(seconds=seconds, words=(metrics.get("verdict") or {}).get("words", "")))
        self.ui.resultsCollapsibleButton.collapsed = False
        self.results.showFirst(run)

    def watch(self, start, onDone):
        """Start another task (``start(task)``), with progress and errors as for a registration."""
        task = Task(onDone=lambda result: (self._ended(_("Done.")), onDone(result)))
        try:
            self._watch(start(task))
        except (InputError, RegistrationError) as error:
            self.fail(error)
        self.update()

    def _watch(self, task):
        self._started, self._lastProgress = time.perf_counter(), None
        task.onProgress, task.onFailed = self._progress, self.fail
        self.ui.progressBar.value = 0
        self.status(_("Starting..."))
        self._clock.start()

    def onCancel(self, *_unused):
        self.logic.cancel()

    def onSwap(self, *_unused):
        state = self.parameters
        wasModifying = state.StartModify()
        for one, other in (("fixedVolume", "movingVolume"), ("fixedMask", "movingMask"), ("fixedLandmarks", "movingLandmarks"),
                           ("fixedLabels", "movingLabels")):
            first, second = getattr(state, one), getattr(state, other)
            setattr(state, one, second)
            setattr(state, other, first)
        state.EndModify(wasModifying)

    def onTryIt(self, *_unused):
        fixed, moving, fixedPoints, movingPoints = sampledata.makePair(slicer.mrmlScene)
        state = self.parameters
        wasModifying = state.StartModify()
        state.fixedVolume, state.movingVolume = fixed, moving
        state.fixedLandmarks, state.movingLandmarks = fixedPoints, movingPoints
        for output, _switch in parameters.OUTPUTS.values():
            setattr(state, output, None)
        state.resultTable = None
        state.EndModify(wasModifying)
        self.register()

    def onDevices(self, *_unused):
        try:
            if install.ensure(self.logic.client):
                self.status(_("Looking for devices..."))
                self.logic.client.request("ping", {}, lambda result: self.status(""), self.fail)
        except install.InstallError as error:
            self.fail(error)

    def _showDevices(self, known):
        combo, wanted = self.ui.deviceComboBox, self.parameters.device if self.parameters is not None else "auto"
        self._updating = True
        combo.clear()
        for value, text in methods.devices(known):
            combo.addItem(text, value)
        combo.currentIndex = max(0, combo.findData(wanted))
        self._updating = False

    # ------------------------------------------------------------------------------------------ what the user sees meanwhile

    def _progress(self, stage, fraction, secondsLeft, message):
        self._lastProgress = (message, secondsLeft, time.perf_counter())
        self.ui.progressBar.value = round(1000 * fraction)
        self._showTime()

    def _showTime(self):
        if self._lastProgress is None:
            return
        message, left, at = self._lastProgress
        text = message[:1].upper() + message[1:]
        if left is not None:
            text += _(", about {time} left").format(time=duration(max(0.0, left - (time.perf_counter() - at))))
        self.status(text)

    def _ended(self, text):
        self._clock.stop()
        self._lastProgress = None
        self.status(text)
        self.log(text)
        self.update()

    def fail(self, error):
        """Tell the user what went wrong; offer the repair when the installation is to blame."""
        text = f"{error.message} {getattr(error, 'hint', '')}".strip()
        self._ended(text)
        if getattr(error, "environment", False):
            if slicer.util.confirmOkCancelDisplay(text + " " + _("Install the libraries again now?"), windowTitle=_("Registration")):
                self.register(repair=True)
        elif text != _("Canceled."):
            slicer.util.errorDisplay(text, windowTitle=_("Registration"))

    def status(self, text):
        self.ui.statusLabel.text = text

    def log(self, text):
        if text:
            self.ui.logTextEdit.appendPlainText(text)

    def close(self):
        """End timers and processes."""
        self._clock.stop()
        self.results.close()
        self.logic.close()


def duration(seconds):
    """``12 s``, ``3 min``: coarse, as estimates are."""
    if seconds < 90:
        return _("{count} s").format(count=round(seconds))
    return _("{count} min").format(count=round(seconds / 60))
