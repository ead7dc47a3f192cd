"""The Results section: numbers, views, carrying nodes along, evaluation, report, removal."""

import json
import os

import qt
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.job import RegistrationError

from . import importing, parameters, parts, results, runs
from .events import guarded
from .looking import LinkedCursor, Outlines
from .section import Section, fitRows
from .views import Views

#: Button -> what it shows.
MODES = {
    "blendButton": "blend",
    "revealButton": "reveal",
    "checkerboardButton": "checkerboard",
    "flickerButton": "flicker",
    "differenceButton": "difference",
    **parts.MAPS,
    "previousButton": "previous",
}
#: Buttons that add something to what is seen.
LOOKING = ("cursorButton", "outlinesButton")
DEFORMATION = {"gridButton": "glyphsButton", "glyphsButton": "gridButton"}


class ResultsPanel(Section):
    """The part of the panel that works on a finished registration; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self.views = Views(slicer.mrmlScene, panel.fail)
        self.views.onLegend = self._legend
        self.cursor = LinkedCursor(slicer.mrmlScene, self._cursorText)
        self.outlines = Outlines(slicer.mrmlScene)
        self._shown = None
        self._places = {}
        ui.resultsTable.cellClicked.connect(guarded(self.onCell))
        ui.applyDirectionComboBox.addItems(
            [_("From the moving to the fixed scan"), _("From the fixed to the moving scan")]
        )
        ui.resultSelector.addAttribute("vtkMRMLTableNode", runs.PREFIX + "Run")
        for name in MODES:
            getattr(ui, name).toggled.connect(guarded(lambda on, n=name: self.onMode(n, on)))
        for name in DEFORMATION:
            getattr(ui, name).toggled.connect(guarded(lambda on, n=name: self.onDeformation(n, on)))
        ui.cursorButton.toggled.connect(guarded(self.onCursor))
        ui.outlinesButton.toggled.connect(guarded(self.onOutlines))
        ui.viewSlider.valueChanged.connect(guarded(lambda value: self.views.setValue(value / 100)))
        ui.applyButton.clicked.connect(guarded(self.onApply))
        ui.applyNodesSelector.checkedNodesChanged.connect(self.update)
        ui.evaluateButton.clicked.connect(guarded(self.onEvaluate))
        ui.exportButton.clicked.connect(guarded(self.onExport))
        ui.removeButton.clicked.connect(guarded(self.onRemove))
        self._fillRows([])

    @property
    def run(self):
        """The chosen registration, or None."""
        state = self.panel.parameters
        table = state.resultTable if state is not None else None
        return runs.Run(table) if runs.isResultTable(table) else None

    def update(self):
        ui, run, busy = self.ui, self.run, self.panel.busy
        for widget in (ui.resultsTabs, ui.exportButton, ui.removeButton):
            widget.enabled = run is not None and not busy
        if run is None:
            self._shown = None
            self._places = {}
            self._fillRows([])
            ui.verdictLabel.visible = False
            return
        warped = run.node("warped_moving") is not None
        for name, mode in MODES.items():
            if mode != "previous":
                getattr(ui, name).enabled = run.node(mode) is not None if mode in runs.PARTS else warped
        state = self.panel.parameters
        ui.outlinesButton.enabled = warped and state.fixedLabels is not None
        ui.applyButton.enabled = bool(ui.applyNodesSelector.checkedNodes())
        labels = state.fixedLabels is not None and state.movingLabels is not None
        points = state.fixedLandmarks is not None and state.movingLandmarks is not None
        ui.evaluateButton.enabled = labels or points
        shown = (run.id, run.node("metrics").GetText() if run.node("metrics") is not None else "")
        if shown != self._shown:
            self._shown = shown
            self.showNumbers(run)

    def showNumbers(self, run):
        metrics = run.metrics
        places = results.places(metrics)
        rows = results.rows(metrics)
        self._places = {len(rows) + k: (row[0], ras) for k, (row, ras) in enumerate(places)}
        self.panel.steer.choosePlace("", None)
        self._fillRows([*rows, *(row for row, _ras in places)])
        text, color = results.verdictText(metrics)
        self.ui.verdictLabel.text = text
        decided = (metrics.get("alignment") or {}).get("reasons", [])
        self.ui.verdictLabel.toolTip = "\n".join([*metrics.get("notes", []), *decided])
        self.ui.verdictLabel.visible = bool(text)
        self.ui.verdictLabel.styleSheet = (
            f"background-color: {color}; color: black; border-radius: 4px;" if color else ""
        )

    def onCell(self, row, _column):
        """Go to the place that a row names; it is also where a repair may begin."""
        name, place = self._places.get(row, ("", None))
        self.panel.steer.choosePlace(name, place)
        if place is not None:
            slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *place)

    def _fillRows(self, rows):
        table = self.ui.resultsTable
        table.clearSpans()
        table.rowCount, table.columnCount = len(rows), 4
        table.setHorizontalHeaderLabels(results.columns())
        table.verticalHeader().visible = False
        header = table.horizontalHeader()
        header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        for column in (1, 2, 3):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        for row, texts in enumerate(rows):
            # what exists only after the run gets the width of all three columns
            alone = not texts[1] and not texts[2]
            for column, text in enumerate(
                (texts[0], texts[3] if alone else texts[1], texts[2], "" if alone else texts[3])
            ):
                cell = qt.QTableWidgetItem(text)
                if column:
                    cell.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
                table.setItem(row, column, cell)
            if alone:
                table.setSpan(row, 1, 1, 3)
        fitRows(table, 12)

    # ------------------------------------------------------------------------------------------ views

    def showFirst(self, run):
        """After a registration: both scans blended, so that the result is seen at once."""
        self.update()
        if run.node("warped_moving") is not None:
            if self.ui.blendButton.checked:
                self.onMode("blendButton", True)
            self.ui.blendButton.checked = True
            if slicer.app.layoutManager() is not None:
                slicer.util.resetSliceViews()

    def onMode(self, name, on):
        ui, run = self.ui, self.run
        if on and name == "previousButton" and not importing.hasPrevious(run):
            ui.previousButton.checked = False
            self.panel.watch(
                lambda task: self.logic.fetchPrevious(run, task),
                lambda _result: setattr(ui.previousButton, "checked", True),
            )
            return
        if on:
            self.panel.align.hide()
            ui.outlinesButton.checked = False
            if name == "previousButton":
                importing.previousNode(self.run)
            for other in MODES:
                if other != name and getattr(ui, other).checked:
                    getattr(ui, other).blockSignals(True)
                    getattr(ui, other).checked = False
                    getattr(ui, other).blockSignals(False)
        try:
            self.views.show(MODES[name] if on else "", self.run, ui.viewSlider.value / 100)
        except RegistrationError as error:
            getattr(ui, name).checked = False
            self.panel.fail(error)
        mode = self.views.mode
        ui.viewSlider.enabled = mode not in ("", "flicker", "previous")
        ui.sliderLabel.text = {"checkerboard": _("Tiles:"), "reveal": _("Border:")}.get(mode, _("Opacity:"))

    def onDeformation(self, name, on):
        if on and getattr(self.ui, DEFORMATION[name]).checked:
            getattr(self.ui, DEFORMATION[name]).checked = False
        if self.run is not None:
            try:
                self.views.showDeformation(self.run, self.ui.gridButton.checked, self.ui.glyphsButton.checked)
            except RegistrationError as error:
                self.panel.fail(error)

    def onCursor(self, on):
        if on and self.run is not None:
            self.cursor.start(self.run)
            self._cursorText(_("Move the mouse over a slice view (with Shift, the other views follow)."))
        else:
            self.cursor.stop()

    def _cursorText(self, text):
        self.ui.cursorLabel.text = text
        self.ui.cursorLabel.visible = bool(text)

    def onOutlines(self, on):
        state, run = self.panel.parameters, self.run
        if on and run is not None and run.node("warped_moving") is not None and state.fixedLabels is not None:
            self.panel.align.hide()
            for name in MODES:
                getattr(self.ui, name).checked = False
            self.outlines.show(run, state.fixedLabels)
        else:
            self.outlines.hide()

    def _legend(self, text):
        self.ui.legendLabel.text = text
        self.ui.legendLabel.visible = bool(text)

    def switchOff(self):
        """All buttons up, the views as they were before."""
        for name in (*MODES, *DEFORMATION, *LOOKING):
            getattr(self.ui, name).checked = False

    def sceneClosed(self):
        for part in (self.views, self.cursor, self.outlines, self.panel.align.view, self.panel.live):
            part.forget()
        self.panel.align.sceneClosed()
        for name in (*MODES, *DEFORMATION, *LOOKING):
            button = getattr(self.ui, name)
            button.blockSignals(True)
            button.checked = False
            button.blockSignals(False)

    # ------------------------------------------------------------------------------------------ actions

    def onApply(self, *_unused):
        chosen = self.ui.applyNodesSelector.checkedNodes()
        fromMoving = self.ui.applyDirectionComboBox.currentIndex == 0
        run = self.run
        self.panel.watch(
            lambda task: self.logic.apply(run, chosen, fromMoving, task),
            lambda made: self.panel.status(
                _("Made: {names}.").format(names=", ".join(node.GetName() for node in made))
            ),
        )

    def onEvaluate(self, *_unused):
        state, run = self.panel.parameters, self.run

        def done(metrics):
            results.fillTable(run.table, metrics)
            self.update()

        self.panel.watch(
            lambda task: self.logic.evaluate(
                run, (state.fixedLabels, state.movingLabels), (state.fixedLandmarks, state.movingLandmarks), task
            ),
            done,
        )

    def onExport(self, *_unused):
        path = askPath(self.run.table.GetName() + ".html")
        if not path:
            return
        try:
            exportReport(self.run, path)
            self.panel.status(_("Saved {path}.").format(path=path))
        except RegistrationError as error:
            self.panel.fail(error)
        except OSError as error:
            text = _("{path} could not be written ({reason}).").format(path=path, reason=error.strerror)
            self.panel.fail(RegistrationError(text, _("Choose another folder, or free some space.")))

    def onRemove(self, *_unused):
        state, run = self.panel.parameters, self.run
        self.switchOff()
        if state.initial == "transform" and state.initialTransform is run.node("pose"):
            parameters.startFrom(state, None)
        run.remove()
        self.panel.update()

    def close(self):
        """The views as they were before; nothing goes on."""
        self.views.show("", None)
        self.cursor.stop()
        self.outlines.hide()


def askPath(suggested):
    """Where a report shall be saved, chosen by the user; "" when canceled."""
    kinds = _("Report with pictures (*.html);;Table (*.csv);;All numbers (*.json)")
    path = qt.QFileDialog.getSaveFileName(None, _("Export report"), suggested, kinds)
    return path[0] if isinstance(path, tuple) else path  # Qt bindings differ: some add the chosen filter


def exportReport(run, path):
    """Write what is known of a run; the file name ending decides: .html, .csv or .json.

    Raises:
        RegistrationError: the page with pictures is not there.
        OSError: the file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".csv":
        text = results.csvText(run.metrics)
    elif ending == ".json":
        text = json.dumps(run.metrics, indent=1)
    else:
        node = run.node("report")
        text = node.GetText() if node is not None else ""
        if not text:
            raise RegistrationError(
                _("The page with pictures of this registration is not there (yet)."),
                _("Wait a moment and try again, or save the numbers as .csv or .json."),
            )
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
