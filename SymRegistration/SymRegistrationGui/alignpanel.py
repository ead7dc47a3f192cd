"""The section *Align by hand*, before anything bends: find the pose, see it, turn and shift it, refine it."""

import slicer
from slicer.i18n import tr as _

from . import methods, parameters, posing, results
from .events import guarded
from .section import Section, fill


class AlignPanel(Section):
    """Find, show and refine the pose; see :class:`~.section.Section`."""

    def __init__(self, ui, panel):
        super().__init__(ui, panel)
        self.view = posing.PoseView(slicer.mrmlScene)
        fill(ui.alignKindComboBox, methods.linearKinds())
        ui.alignButton.clicked.connect(guarded(lambda *_unused: self.align()))
        ui.snapButton.clicked.connect(guarded(lambda *_unused: self.align(self.pose)))
        ui.showPoseButton.toggled.connect(guarded(self.onShow))
        ui.handlesCheckBox.toggled.connect(guarded(lambda on: self.view.setHandles(on)))

    @property
    def pose(self):
        """The linear transform node to turn, shift and start from, or None."""
        state = self.panel.parameters
        node = state.initialTransform if state is not None and state.initial == "transform" else None
        return node if node is not None and node.IsTransformToWorldLinear() else None

    def update(self):
        ui, busy = self.ui, self.panel.busy
        problem = self.panel.problem(aligning=True)
        ui.alignButton.enabled = not busy and not problem
        ui.alignButton.toolTip = problem or _("Find where the moving scan lies. Nothing bends yet.")
        if self.view.shown and (self.pose is None or not self.view.isOf(self.panel.parameters.movingVolume, self.pose)):
            self.hide()
        here = not busy and not problem and self.pose is not None
        for widget in (ui.snapButton, ui.showPoseButton, ui.handlesCheckBox):
            widget.enabled = here
        ui.snapButton.toolTip = (
            _("Refine the pose from where it is now, without looking elsewhere.")
            if here
            else _("Press Align first, or choose a linear start transform.")
        )

    def align(self, start=None):
        """What Align does, and, with ``start`` (a linear transform node), what Snap does."""
        self.panel.begin(lambda state: parameters.alignRequest(state, start), self._aligned)

    def _aligned(self, run):
        """The pose is the start of what follows; it is shown with its handles."""
        state = self.panel.parameters
        results.fillTable(run.table, run.metrics)
        pose = posing.setPose(run)
        parameters.rememberOutputs(state, run)
        parameters.startFrom(state, pose)
        self.panel.ended(_("Aligned. {words} Turn or shift it by its handles, Snap, or Register from there."), run)
        self.panel.results.switchOff()
        self.ui.showPoseButton.checked = False
        self.ui.showPoseButton.checked = True

    def onShow(self, on):
        state = self.panel.parameters
        if not on or state is None or self.pose is None:
            self.view.hide()
            return
        self.panel.results.switchOff()
        self.view.show(state.fixedVolume, state.movingVolume, self.pose, self.ui.handlesCheckBox.checked)

    def hide(self):
        """The views as they were, the button up."""
        self.ui.showPoseButton.checked = False
        self.view.hide()

    def sceneClosed(self):
        self.view.forget()
        self.ui.showPoseButton.blockSignals(True)
        self.ui.showPoseButton.checked = False
        self.ui.showPoseButton.blockSignals(False)
