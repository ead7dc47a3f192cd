"""The tab *Steps*: what was done to a result, each step's numbers side by side; undo, redo, compare, save."""

import qt
from slicer.i18n import tr as _

from . import history, importing, results
from .events import guarded
from .section import Section, fitRows


def columns():
    """(key in a step's numbers, digits, heading, what it is) of the numbers that are shown."""
    return (
        ("similarity", 3, _("Similarity"), _("Similarity of both scans, 0 to 1")),
        ("mean_dice", 3, _("Dice"), _("Mean overlap of the structures")),
        ("mean_landmark_error_mm", 2, _("mm"), _("Mean distance of the landmarks, mm")),
        ("folded_voxels", 0, _("Folds"), _("Folded voxels")),
        ("jacobian_min", 2, _("Least"), _("Smallest volume factor; 0 or less is folded")),
    )


def stepName(step):
    """A step in words: what it did, and by which method where that says more."""
    words = {"register": _("Register"), "update": _("Update"), "repair": _("Repair")}
    method = ((step.get("job") or {}).get("options") or {}).get("method", "")
    name = words.get(step.get("step"), step.get("step", ""))
    if step.get("step") == "register" and method in ("rigid", "similarity", "affine"):
        name = _("Align")
    return f"{name} ({method})" if step.get("step") == "register" and method else name


class StepsPanel(Section):
    """The table of steps and its buttons; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self._shown = None
        ui.undoButton.clicked.connect(guarded(lambda *_unused: self._move(self.logic.undo, _("Undone."))))
        ui.redoButton.clicked.connect(guarded(lambda *_unused: self._move(self.logic.redo, _("Done again."))))
        ui.saveStepsButton.clicked.connect(guarded(self.onSave))
        self._fill(0, [])

    def update(self):
        ui, run, busy = self.ui, self.panel.results.run, self.panel.busy
        current, known = history.steps(run)
        free = run is not None and not busy
        ui.undoButton.enabled = free and current > 1
        ui.redoButton.enabled = free and current < len(known)
        ui.saveStepsButton.enabled = free and bool(known)
        ui.previousButton.enabled = free and (current > 1 or importing.hasPrevious(run))
        ui.undoButton.toolTip = (
            _("Show step {number} again; nothing is optimized.").format(number=current - 1)
            if current > 1
            else _("There is nothing to undo.")
        )
        shown = (run.id, run.text("history")) if run is not None else None
        if shown != self._shown:
            self._shown = shown
            self._fill(current, known)

    def _fill(self, current, known):
        table = self.ui.stepsTable
        numbers = [step.get("numbers") or {} for step in known]
        shown = [column for column in columns() if any(told.get(column[0]) is not None for told in numbers)]
        table.rowCount, table.columnCount = len(known), 1 + len(shown)
        table.setHorizontalHeaderLabels([_("Step"), *(heading for _key, _digits, heading, _what in shown)])
        for column, (_key, _digits, _heading, what) in enumerate(shown, 1):
            table.horizontalHeaderItem(column).setToolTip(what)
        table.verticalHeader().visible = False
        for row, (step, told) in enumerate(zip(known, numbers)):
            now = step["number"] == current
            texts = [("\u25b6 " if now else "") + f"{step['number']} {stepName(step)}"]
            texts += [results.number(told.get(key), digits) for key, digits, _heading, _what in shown]
            for column, text in enumerate(texts):
                cell = qt.QTableWidgetItem(text)
                font = cell.font()
                font.setBold(now)
                cell.setFont(font)
                table.setItem(row, column, cell)
            table.item(row, 0).setToolTip(_("{seconds} s").format(seconds=results.number(told.get("seconds"), 1)))
        table.wordWrap = False
        header = table.horizontalHeader()
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(0, qt.QHeaderView.Stretch)
        fitRows(table, 8)

    def _move(self, start, said):
        run = self.panel.results.run
        self.panel.goOn(run, lambda task: start(run, task), said)

    def onSave(self, *_unused):
        folder = askFolder()
        if not folder:
            return
        run = self.panel.results.run
        self.panel.watch(
            lambda task: self.logic.saveSteps(run, folder, task),
            lambda path: self.panel.status(
                _("Saved. 'symreg register --job {path} -o FOLDER' does all steps again.").format(path=path)
            ),
        )


def askFolder():
    """Where the steps shall be saved, chosen by the user; "" when canceled."""
    return qt.QFileDialog.getExistingDirectory(None, _("Save the steps, with the scans, into a folder"))
