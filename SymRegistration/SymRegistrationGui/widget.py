"""The module panel: connects the .ui file to the state and to the logic. It computes nothing."""

import time

import qt
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError, RegistrationError
from SymRegistrationLib.registration.catalogue import needs_weights

from . import exporting, install, methods, parameters, parts, results, sampledata, settings
from .alignpanel import AlignPanel
from .contrastpanel import ContrastPanel
from .events import guarded, later
from .link import Link
from .live import LiveView
from .logic import Task
from .presetpanel import PresetPanel
from .resultspanel import ResultsPanel
from .section import fill, follow
from .steerpanel import SteerPanel
from .stepspanel import StepsPanel

#: Combo box -> the parameter it shows; filled by code, because texts are translated and values are not.
COMBOS = {
    "methodComboBox": "method",
    "presetComboBox": "preset",
    "metricComboBox": "metric",
    "initialComboBox": "initial",
    "slidingComboBox": "sliding",
    "deviceComboBox": "device",
    "alignKindComboBox": "alignKind",
}


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
        self._link = None
        self._updating = self._installing = False
        self.closed = False
        self._hint = self._told = ""
        self._started = 0.0
        logic.client.onLog = self.log
        logic.client.onDevices = self._showDevices
        self._selectors = parts.addRows(ui)
        parts.addButtons(ui)
        self.results = ResultsPanel(ui, self)
        self.presets = PresetPanel(ui, self)
        self.contrasts = ContrastPanel(ui, self)
        self.align = AlignPanel(ui, self)
        self.steer = SteerPanel(ui, self)
        self.steps = StepsPanel(ui, self)
        self.live = LiveView(slicer.mrmlScene, ui.liveLabel, ui.liveCurveLabel)
        self._again = None
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
        for combo, pairs in (
            (ui.presetComboBox, methods.presets()),
            (ui.metricComboBox, methods.metrics()),
            (ui.initialComboBox, methods.initials()),
            (ui.slidingComboBox, methods.slidings()),
            (ui.deviceComboBox, methods.devices([])),
        ):
            fill(combo, pairs)

    def _connect(self):
        ui = self.ui
        for name, parameter in COMBOS.items():
            follow(getattr(ui, name), self.choose, parameter)
        # The path edit tells of a path that it finds valid, and of losing validity, but not of further typing, nor of
        # an empty text; the line inside it tells of everything.
        for signal in (
            ui.weightsPathEdit.currentPathChanged,
            ui.weightsPathEdit.validInputChanged,
            *(
                child.textChanged
                for child in slicer.util.findChildren(ui.weightsPathEdit)
                if hasattr(child, "editingFinished")
            ),
        ):
            signal.connect(self._readWeights)
        ui.idleSpinBox.value = settings.idleMinutes()
        ui.idleSpinBox.valueChanged.connect(guarded(lambda *_unused: settings.setIdleMinutes(ui.idleSpinBox.value)))
        for button, slot in (
            (ui.registerButton, self.onRegister),
            (ui.cancelButton, self.onCancel),
            (ui.enoughButton, self.onEnough),
            (ui.swapButton, self.onSwap),
            (ui.tryItButton, self.onTryIt),
            (ui.devicesButton, self.onDevices),
        ):
            button.clicked.connect(guarded(slot))

    # ------------------------------------------------------------------------------------------ state

    def setScene(self, scene):
        """The selectors that are not in the .ui file follow another scene, or None."""
        for selector in self._selectors:
            selector.setMRMLScene(scene)
        self.contrasts.setScene(scene)

    def setParameters(self, wrapped):
        """Show another parameter node, or None while a scene closes and when the panel is closed."""
        if self._link is not None:
            self._link.cut()
        self.parameters, self._link = wrapped, None
        if wrapped is not None:
            self.closed = False
            self._link = Link(wrapped, self.ui, self._parametersChanged)
            parameters.guessScans(wrapped, slicer.mrmlScene)
        self.update()

    def _readWeights(self, *_unused):
        self.choose("weights", self.ui.weightsPathEdit.currentPath)

    def choose(self, name, value):
        """The user has chosen ``value`` for a parameter."""
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
            self.presets.update()
            self.contrasts.update()
            self._showButtons()
        finally:
            self._updating = False
        self.results.update()
        for part in (self.align, self.steer, self.steps):
            part.update()

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
        network = needs_weights(state.method)
        for widget in (ui.refineLabel, ui.refineSpinBox, ui.weightsLabel, ui.weightsPathEdit):
            widget.visible = network
        for widget in (ui.presetLabel, ui.presetComboBox, ui.metricLabel, ui.metricComboBox):
            widget.enabled = not network or state.refine > 0
        for widget in (ui.initialTransformLabel, ui.initialTransformSelector):
            widget.visible = state.initial == "transform"
        for name in ("fixedSlidingMask", "movingSlidingMask"):
            for kind in ("Label", "Selector"):
                getattr(ui, f"{name}{kind}").visible = state.sliding == "auto"
        ui.guideCheckBox.enabled = state.fixedLandmarks is not None and state.movingLandmarks is not None
        for output, switch in parts.OUTPUTS.values():
            getattr(ui, f"{output}Selector").enabled = not switch or int(getattr(state, switch)) > 0

    @property
    def updating(self):
        """True while the widgets are brought in line with the state: what they say then is no choice of the user."""
        return self._updating

    @property
    def busy(self):
        """True while a registration, another task or an installation is under way."""
        return self.logic.busy or self._installing

    def _showButtons(self):
        ui, busy = self.ui, self.busy
        problem = self.problem()
        ui.registerButton.enabled = not busy and not problem
        ui.registerButton.toolTip = problem or _("Register the moving scan to the fixed one, and the other way round.")
        hint = " ".join(
            filter(None, (self._told, problem))
        )  # what went wrong stays to be read beside what is missing now
        if not busy and (problem or ui.statusLabel.text == self._hint):
            self.status(hint)
        self._hint = hint
        ui.cancelButton.enabled = self.logic.busy
        ui.enoughButton.enabled = True
        ui.enoughButton.visible = self.logic.busy and self.live.watching
        for section in (
            ui.inputsCollapsibleButton,
            ui.methodCollapsibleButton,
            ui.contrastsCollapsibleButton,
            ui.advancedCollapsibleButton,
            ui.alignCollapsibleButton,
            ui.steeringCollapsibleButton,
            ui.outputsCollapsibleButton,
        ):
            section.enabled = not busy
        ui.progressBar.visible = self.logic.busy

    def problem(self, aligning=False):
        """Why Register (or, ``aligning``, Align) cannot be pressed now, "" when it can."""
        return parameters.problem(self.parameters, self._methods, aligning)

    # ------------------------------------------------------------------------------------------ actions

    def onRegister(self, *_unused):
        self.register()

    def register(self, repair=False):
        """What the Register button does."""
        self._readWeights()
        self.begin(parameters.request, self._registered, repair)

    def begin(self, requested, onDone, repair=False):
        """Start a registration.

        Args:
            requested: ``requested(parameters)`` gives the request.
            onDone: gets the run.
            repair: install the libraries again before.
        """
        if self.busy or self.parameters is None:
            return
        self._again = lambda: self.begin(requested, onDone, True)
        try:
            request = requested(self.parameters)
            exporting.check(request)  # nothing is installed for what cannot be done anyway
            if not self._ensureInstalled(repair):
                self.status(_("Nothing was installed; the registration was not started."))
                return
            if self.closed:
                return
            if None in (request.fixedNode.GetScene(), request.movingNode.GetScene()):
                raise RegistrationError(
                    _("A scan was deleted or the scene was closed during the installation; nothing was registered."),
                    _("The libraries are installed now: choose two scans and press Register."),
                )
            self.align.hide()
            self._watch(self.logic.register(request, Task(onDone=guarded(onDone))))
            if request.live:
                self.live.begin(request.fixedNode)
        except (InputError, RegistrationError, install.InstallError) as error:
            self.fail(error)
        self.update()

    def _ensureInstalled(self, repair=False):
        """True when all libraries are there. Meanwhile the panel says what goes on, and takes no second click."""
        if self._installing:
            return False
        try:
            return install.ensure(self.logic.client, repair, self._installationBegins)
        finally:
            if self._installing:
                self._installing = False
                slicer.app.restoreOverrideCursor()
                if not self.closed:
                    self.update()

    def _installationBegins(self, text):
        self._installing = True
        slicer.app.setOverrideCursor(qt.Qt.BusyCursor)
        self.update()
        self.status(text)
        self.log(text)
        slicer.app.processEvents()  # pip says nothing for a while, and until then nothing would be drawn

    def _registered(self, run):
        results.fillTable(run.table, run.metrics)
        parameters.rememberOutputs(self.parameters, run)
        self.ended(_("Done in {seconds:.1f} s. {words}"), run)
        self.results.showFirst(run)

    def ended(self, pattern, run):
        """A result is there: said in the status line (``pattern`` with ``seconds`` and ``words``), shown in Results."""
        seconds = time.perf_counter() - self._started
        self._ended(pattern.format(seconds=seconds, words=results.endText(run.metrics)))
        self.ui.resultsCollapsibleButton.collapsed = False

    def goOn(self, run, start, said, repair=False):
        """Update, repair, undo or redo ``run``: ``start(task)``; ``said`` when it is done.

        Args:
            repair: install the libraries again before.
        """

        def done(run):
            results.fillTable(run.table, run.metrics)
            self.ended(said + " {words}", run)
            self.results.views.refresh()

        self.align.hide()
        task = Task(onDone=guarded(done))
        self._again = lambda: self.goOn(run, start, said, True)
        try:
            if not self._ensureInstalled(repair) or self.closed:
                return
            self._watch(start(task))
            self.live.begin(run.node("fixed"))
        except (InputError, RegistrationError, install.InstallError) as error:
            self.fail(error)
        self.update()

    def watch(self, start, onDone):
        """Start another task (``start(task)``), with progress and errors as for a registration."""
        task = Task(onDone=guarded(lambda result: (self._ended(_("Done.")), onDone(result))))
        try:
            self._watch(start(task))
        except (InputError, RegistrationError) as error:
            self.fail(error)
        self.update()

    def _watch(self, task):
        self._started, self._lastProgress, self._told = time.perf_counter(), None, ""
        task.onProgress, task.onFailed, task.onLevel = self._progress, self.fail, self.live.level
        self.ui.progressBar.value = 0
        self.status(_("Starting..."))
        self._clock.start()

    def onCancel(self, *_unused):
        self.logic.cancel()

    def onEnough(self, *_unused):
        self.ui.enoughButton.enabled = False
        self.logic.enough()

    def onSwap(self, *_unused):
        parameters.swap(self.parameters)

    def onTryIt(self, *_unused):
        if self.busy:
            return
        pair = sampledata.makePair(slicer.mrmlScene)
        parameters.choosePair(self.parameters, *pair)
        sampledata.showPair(*pair[:2])
        self.register()

    def onDevices(self, *_unused):
        if self.busy:
            return
        try:
            if self._ensureInstalled() and not self.closed:
                self.status(_("Looking for devices..."))
                self.logic.client.request("ping", {}, lambda result: self.status(""), self.fail)
        except install.InstallError as error:
            self.fail(error)

    def _showDevices(self, known):
        combo, wanted = self.ui.deviceComboBox, self.parameters.device if self.parameters is not None else "auto"
        self._updating = True
        combo.clear()
        fill(combo, methods.devices(known))
        combo.currentIndex = max(0, combo.findData(wanted))
        self._updating = False

    # ------------------------------------------------------------------------------------- what the user sees meanwhile

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
        self.live.end()
        self._lastProgress = None
        self.status(text)
        self.log(text)
        self.update()

    def fail(self, error):
        """Tell the user what went wrong, in the panel and in a box; offer the repair when the installation is to blame.

        The box waits until the event is over: this is also called while a scene closes or a node goes.
        """
        text = f"{error.message} {getattr(error, 'hint', '')}".strip()
        self._told = text
        self._ended(text)
        if getattr(error, "environment", False):
            later(lambda: self._offerRepair(text))
        elif text != _("Canceled."):
            later(lambda: slicer.util.errorDisplay(text, windowTitle=_("Registration")))

    def _offerRepair(self, text):
        agreed = slicer.util.confirmOkCancelDisplay(
            text + " " + _("Install the libraries again now?"), windowTitle=_("Registration")
        )
        if agreed and not self.closed:
            (self._again or (lambda: self.register(repair=True)))()

    def status(self, text):
        self.ui.statusLabel.text = text

    def log(self, text):
        if text:
            self.ui.logTextEdit.appendPlainText(text)

    def close(self):
        """Let go of everything: timers, processes, the parameter node. What is connected to the widgets stays silent.

        :meth:`setParameters` opens it again.
        """
        self.closed = True
        self._clock.stop()
        self.align.hide()
        self.results.close()
        self.logic.close()
        self.setParameters(None)


def duration(seconds):
    """``12 s``, ``3 min``: coarse, as estimates are."""
    if seconds < 90:
        return _("{count} s").format(count=round(seconds))
    return _("{count} min").format(count=round(seconds / 60))
