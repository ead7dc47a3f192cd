"""What pulls (section *What pulls*), and going on from a result (tab *Improve*): Update and Repair."""

import qt
from slicer.i18n import tr as _

from . import methods, nodes, parameters, results
from .events import guarded
from .section import Section, fill, fitRows, follow

#: Every structure that both scans have; what label maps offer, whose labels have no names here.
ALL = "all"


class SteerPanel(Section):
    """Landmarks, structures, regions; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self._listed = self._shownOf = None
        self.place = None
        places = ("node", _("Painted segment, label map or box")), ("place", _("Sphere at a place of the table"))
        fill(ui.repairWhereComboBox, places)
        fill(ui.repairMetricComboBox, (("same", _("As before")), *methods.metrics()[1:]))
        for combo, name in (
            (ui.repairWhereComboBox, "repairWhere"),
            (ui.repairMetricComboBox, "repairMetric"),
            (ui.repairSegmentComboBox, "repairSegment"),
        ):
            follow(combo, panel.choose, name)
        ui.structuresList.itemChanged.connect(guarded(self._ticked))
        ui.updateButton.clicked.connect(guarded(self.onUpdate))
        ui.repairButton.clicked.connect(guarded(self.onRepair))

    def update(self):
        state, run, busy = self.panel.parameters, self.panel.results.run, self.panel.busy
        ui = self.ui
        if state is not None:
            self._showState(state)
        here = run is not None and not busy
        bends = here and run.node("forward") is not None and not run.node("forward").IsLinear()
        for button, what in ((ui.updateButton, _("update")), (ui.repairButton, _("repair"))):
            button.enabled = here and (bends or button is ui.updateButton)
            button.toolTip = (
                _("Go on from the result that is shown. Undo brings it back.")
                if button.enabled
                else _("Register first: there is nothing to {what}.").format(what=what)
            )
        shown = None if run is None else (run.id, run.text("metrics"))
        if shown != self._shownOf:
            self._shownOf = shown
            self._fillResiduals(run.metrics if run is not None else {})

    def _showState(self, state):
        ui = self.ui
        points = None not in parameters.pair(state, "Landmarks")
        ui.driveLandmarksCheckBox.enabled = points
        for widget in (ui.landmarkWeightSpinBox, ui.landmarkToleranceSpinBox):
            widget.enabled = points and state.driveLandmarks
        self._listStructures(state)
        ui.labelWeightSpinBox.enabled = bool(parameters.driven(state))
        sphere = state.repairWhere == "place"
        for combo, name in ((ui.repairWhereComboBox, "repairWhere"), (ui.repairMetricComboBox, "repairMetric")):
            combo.currentIndex = max(0, combo.findData(getattr(state, name)))
        for widget in (ui.repairRegionLabel, ui.repairRegionSelector):
            widget.visible = not sphere
        for widget in (ui.repairRadiusLabel, ui.repairRadiusSpinBox, ui.placeLabel):
            widget.visible = sphere
        ui.placeLabel.text = (
            _("Click a folded or an uncertain place in the table above.")
            if self.place is None
            else _("At {name}.").format(name=self.place[0])
        )
        self._listSegments(state, sphere)

    def _listStructures(self, state):
        """The structures that both scans have, ticked where they pull."""
        names = self._shared(*parameters.pair(state, "Labels"))
        chosen = set(parameters.driven(state))
        content = (names, frozenset(chosen))
        if content == self._listed:
            return
        self._listed = content
        structures = self.ui.structuresList
        structures.blockSignals(True)
        structures.clear()
        for name in names:
            item = qt.QListWidgetItem(_("All labels") if name == ALL else name)
            item.setData(qt.Qt.UserRole, name)
            item.setFlags(qt.Qt.ItemIsUserCheckable | qt.Qt.ItemIsEnabled)
            item.setCheckState(qt.Qt.Checked if name in chosen else qt.Qt.Unchecked)
            structures.addItem(item)
        structures.blockSignals(False)
        structures.visible = bool(names)
        height = structures.sizeHintForRow(0) * min(len(names), 8) + 2 * structures.frameWidth
        structures.minimumHeight = structures.maximumHeight = height
        self.ui.structuresLabel.visible = bool(names)

    @staticmethod
    def _shared(fixed, moving):
        if fixed is None:
            return ()
        both = [nodes.segmentNames(node) for node in (fixed, moving)]
        if None in both:
            return (ALL,)
        common = tuple(name for name in both[0] if name in both[1])
        return common or tuple(both[0][: len(both[1])])

    def _ticked(self, *_unused):
        structures = self.ui.structuresList
        items = [structures.item(row) for row in range(structures.count)]
        chosen = [item.data(qt.Qt.UserRole) for item in items if item.checkState() == qt.Qt.Checked]
        self.panel.choose("driveSegments", "\n".join(chosen))

    def _listSegments(self, state, sphere):
        combo = self.ui.repairSegmentComboBox
        region = state.repairRegion
        names = (
            (nodes.segmentNames(region) or ()) if region is not None and region.IsA("vtkMRMLSegmentationNode") else ()
        )
        for widget in (self.ui.repairSegmentLabel, combo):
            widget.visible = bool(names) and not sphere
        if [combo.itemData(k) for k in range(1, combo.count)] != list(names):
            combo.blockSignals(True)
            combo.clear()
            combo.addItem(_("All segments"), "")
            for name in names:
                combo.addItem(name, name)
            combo.blockSignals(False)
        combo.currentIndex = max(0, combo.findData(state.repairSegment))

    def _fillResiduals(self, metrics):
        """What is left of each landmark pair that pulled."""
        rows = results.residuals(metrics)
        table = self.ui.residualTable
        table.rowCount, table.columnCount = len(rows), 4
        table.setHorizontalHeaderLabels([_("Landmark"), _("Left, mm"), _("Tolerance, mm"), ""])
        table.verticalHeader().visible = False
        for row, (name, left, allowed, met) in enumerate(rows):
            texts = (name, f"{left:.2f}", f"{allowed:.2f}", _("met") if met else _("NOT met"))
            for column, text in enumerate(texts):
                table.setItem(row, column, qt.QTableWidgetItem(text))
        header = table.horizontalHeader()
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        fitRows(table, 8)
        table.visible = bool(rows)
        self.ui.residualLabel.visible = bool(rows)

    def choosePlace(self, name, place):
        """A row of the table of doubtful places was clicked; ``place`` is None for another row."""
        self.place = None if place is None else (name, place)
        if self.panel.parameters is not None:
            self._showState(self.panel.parameters)

    # ------------------------------------------------------------------------------------------ actions

    def onUpdate(self, *_unused):
        run = self.panel.results.run
        self.panel.goOn(
            run, lambda task: self.logic.change(run, parameters.update(self.panel.parameters), task), _("Updated.")
        )

    def onRepair(self, *_unused):
        run, place = self.panel.results.run, self.place[1] if self.place is not None else None
        self.panel.goOn(
            run,
            lambda task: self.logic.change(run, parameters.repair(self.panel.parameters, place), task),
            _("Repaired."),
        )
