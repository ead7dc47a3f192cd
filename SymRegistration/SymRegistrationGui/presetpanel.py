"""Presets by anatomy in the panel: choose one, let one be suggested, keep one of your own, delete it."""

import qt
from slicer.i18n import tr as _

from SymRegistrationLib.job import InputError, RegistrationError

from . import methods, parameters
from .events import guarded
from .section import Section


class PresetPanel(Section):
    """The list of presets and its buttons; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self._suggested = None
        self.read()
        ui.anatomyComboBox.currentIndexChanged.connect(guarded(self.onChosen))
        ui.suggestButton.clicked.connect(guarded(self.onSuggest))
        ui.savePresetButton.clicked.connect(guarded(self.onSave))
        ui.deletePresetButton.clicked.connect(guarded(self.onDelete))

    def read(self):
        """Fill the list anew: presets of one's own may have come from elsewhere."""
        box, self._own = self.ui.anatomyComboBox, methods.ownAnatomies()
        box.blockSignals(True)
        box.clear()
        for name, title, reason in methods.anatomies():
            box.addItem(title, name)
            box.setItemData(box.count - 1, reason, qt.Qt.ToolTipRole)
        box.blockSignals(False)

    def update(self):
        ui, state, busy = self.ui, self.panel.parameters, self.panel.busy
        ui.suggestButton.enabled = not busy and not self.panel.problem(aligning=True)
        ui.savePresetButton.enabled = not busy and state is not None
        ui.deletePresetButton.enabled = not busy and state is not None and state.anatomy in self._own
        if state is None or self._suggested not in (None, (state.fixedVolume, state.movingVolume)):
            self._suggested = None  # the reason was about other scans
        if self._suggested is None:
            ui.suggestionLabel.text = ""
        ui.suggestionLabel.visible = bool(ui.suggestionLabel.text)
        box = ui.anatomyComboBox
        if state is not None:
            box.currentIndex = box.findData(state.anatomy)  # none for a preset that this computer does not have
            box.toolTip = box.itemData(box.currentIndex, qt.Qt.ToolTipRole) or state.anatomy

    def onChosen(self, *_unused):
        state, box = self.panel.parameters, self.ui.anatomyComboBox
        if state is None or self.panel.updating:
            return
        name = box.itemData(box.currentIndex)
        try:
            parameters.applyAnatomy(state, name)
        except (TypeError, ValueError) as error:  # of a file that was written by hand
            text = _("Preset '{name}' asks for what the panel cannot show ({error}).").format(name=name, error=error)
            self.panel.fail(InputError(text, _("Use it on the command line, or choose another one.")))

    def onSuggest(self, *_unused):
        state = self.panel.parameters
        scans = state.fixedVolume, state.movingVolume

        def done(told):
            parameters.applyAnatomy(state, told["preset"])
            self._suggested = scans
            self.ui.suggestionLabel.text = _("Suggested because {reason}.").format(reason=told["reason"].rstrip("."))
            self.panel.update()

        self.panel.watch(lambda task: self.panel.logic.suggest(*scans, task), done)

    def onSave(self, *_unused):
        title = askTitle().strip()
        if not title:
            return
        try:
            self.keep(title)
        except (InputError, RegistrationError) as error:
            self.panel.fail(error)
            return
        self.panel.status(_("Saved as '{title}': listed under Anatomy from now on.").format(title=title))

    def keep(self, title):
        """Save what is chosen now as a preset of the user's own and choose it; returns its name. Raises as
        :func:`.methods.saveAnatomy`."""
        name = methods.saveAnatomy(title, parameters.ownPreset(self.panel.parameters))
        self.read()
        self.panel.parameters.anatomy = name
        self.panel.update()
        return name

    def onDelete(self, *_unused):
        state, title = self.panel.parameters, self.ui.anatomyComboBox.currentText
        try:
            methods.removeAnatomy(state.anatomy)
        except (InputError, RegistrationError) as error:
            self.panel.fail(error)
            return
        self.read()
        parameters.applyAnatomy(state, methods.anatomies()[0][0])
        self.panel.update()
        self.panel.status(_("Deleted '{title}'.").format(title=title))


def askTitle():
    """What the user calls a new preset; "" when canceled."""
    title = qt.QInputDialog.getText(None, _("Save as preset"), _("Name, as it shall be listed under Anatomy:"))
    return title[0] if isinstance(title, tuple) else title  # Qt bindings differ: some add whether it was accepted
