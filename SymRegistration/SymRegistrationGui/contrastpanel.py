"""The section *Further contrasts*: a row per pair of scans, the pair that is registered first."""

import qt
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.job import MOST_CONTRASTS

from . import parameters
from .events import guarded
from .section import Section, fitRows

_FIXED, _MOVING, _WEIGHT = range(3)


class ContrastPanel(Section):
    """The table of pairs; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self._scene = None
        table = ui.contrastsTable
        table.columnCount = 3
        table.setHorizontalHeaderLabels([_("Fixed"), _("Moving"), _("Weight")])
        table.verticalHeader().visible = False
        header = table.horizontalHeader()
        for column in (_FIXED, _MOVING):
            header.setSectionResizeMode(column, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(_WEIGHT, qt.QHeaderView.ResizeToContents)
        ui.addContrastButton.clicked.connect(guarded(lambda *_unused: self._resize(1)))
        ui.removeContrastButton.clicked.connect(guarded(lambda *_unused: self._resize(-1)))

    def setScene(self, scene):
        """The selectors follow this scene from now on, or None."""
        self._scene = scene
        self._setRows(0)

    def update(self):
        state = self.panel.parameters
        fixed, moving = ([], []) if state is None else (list(state.fixedContrasts), list(state.movingContrasts))
        count, table = max(len(fixed), len(moving)), self.ui.contrastsTable
        self.ui.addContrastButton.enabled = state is not None and count < MOST_CONTRASTS - 1
        self.ui.removeContrastButton.enabled = count > 0
        self._setRows(count + 1 if count else 0)
        if not count:
            return
        for column, node in ((_FIXED, state.fixedVolume), (_MOVING, state.movingVolume)):
            table.item(0, column).setText(node.GetName() if node is not None else "\u2013")
        weights = list(state.contrastWeights)
        for row in range(count + 1):
            box = table.cellWidget(row, _WEIGHT)
            box.value = weights[row] if row < len(weights) else 1.0
            for column, chosen in ((_FIXED, fixed), (_MOVING, moving)) if row else ():
                table.cellWidget(row, column).setCurrentNode(chosen[row - 1] if row <= len(chosen) else None)

    def _setRows(self, count):
        table = self.ui.contrastsTable
        for row in range(table.rowCount, count):
            table.insertRow(row)
            for column in (_FIXED, _MOVING):
                if row:
                    table.setCellWidget(row, column, self._selector())
                else:
                    table.setItem(row, column, qt.QTableWidgetItem())
            table.setCellWidget(row, _WEIGHT, self._weight())
        table.rowCount = count
        table.visible = count > 0
        fitRows(table, MOST_CONTRASTS)

    def _selector(self):
        selector = slicer.qMRMLNodeComboBox()
        selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        selector.showChildNodeTypes = selector.addEnabled = selector.removeEnabled = selector.renameEnabled = False
        selector.noneEnabled = True
        selector.noneDisplay = _("Select a volume")
        selector.setMRMLScene(self._scene)
        selector.setCurrentNode(None)
        selector.currentNodeChanged.connect(guarded(self._changed))
        return selector

    def _weight(self):
        box = qt.QDoubleSpinBox()
        box.minimum, box.maximum, box.singleStep, box.decimals = 0.05, 10.0, 0.25, 2
        box.value = 1.0
        box.toolTip = _("How much this pair counts, compared with the others.")
        box.valueChanged.connect(guarded(self._changed))
        return box

    def _changed(self, *_unused):
        """The user has chosen a scan or a weight, or a chosen scan has left the scene."""
        if self.panel.parameters is not None and not self.panel.updating:
            self._write(self.ui.contrastsTable.rowCount)

    def _resize(self, by):
        self._write(max(self.ui.contrastsTable.rowCount, 1) + by)

    def _write(self, count):
        """Keep the first ``count`` rows of the table, with empty ones where it has fewer."""
        table = self.ui.contrastsTable
        rows = []
        for row in range(1, count):
            there = row < table.rowCount
            nodes = [table.cellWidget(row, column).currentNode() if there else None for column in (_FIXED, _MOVING)]
            rows.append((*nodes, table.cellWidget(row, _WEIGHT).value if there else 1.0))
        first = table.cellWidget(0, _WEIGHT).value if table.rowCount else 1.0
        parameters.setContrasts(self.panel.parameters, rows, first)
