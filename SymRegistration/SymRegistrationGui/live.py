"""A look while it runs: after each level the warped scan, small, in the views, and its numbers. All of it is
temporary."""

import qt
from slicer.i18n import tr as _

from SymRegistrationLib.job import RegistrationError

from . import exchange, nodes
from .layers import Layers, temporaryVolume
from .steps import complete

WIDTH, HEIGHT = 220, 60


class LiveView:
    """Args:
    scene: the vtkMRMLScene.
    label: shows the numbers. curve: shows them as lines (a QLabel).
    """

    def __init__(self, scene, label, curve):
        self.scene, self.label, self.curve = scene, label, curve
        self.layers = Layers(scene)
        self.levels = []
        self._node = self._fixed = None
        self._show()

    @property
    def watching(self):
        """True while a run that tells of its levels is on."""
        return self._fixed is not None

    def begin(self, fixedNode):
        """A run on this scan has started."""
        self.end()
        self._fixed = fixedNode

    def level(self, event):
        """What the worker tells after a level; its image is a small file that is there until the job ends."""
        if self._fixed is None or self._fixed.GetScene() is None:
            return
        try:
            array, grid = complete(exchange.readVolume(event["image"]))
            fill = complete(nodes.volumeFiller(array, grid))
        except (OSError, RegistrationError):  # the job has just ended and taken its files with it
            return
        new = self._node is None
        if new:
            self._node = temporaryVolume(self.scene, "SymRegistration live view")
            self._node.CreateDefaultDisplayNodes()
            display = self._node.GetDisplayNode()
            display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(0.0, 1.0)
        fill(self._node)
        if new:
            self.layers.show(self._fixed, self._node, 0.5)
        self.levels.append((event["similarity"], event["folded_percent"]))
        self._show(event)

    def end(self):
        """The run is over, whatever way: nothing of this is left."""
        self.layers.restore()
        if self._node is not None and self._node.GetScene() is not None:
            nodes.discard(self._node)
        self._node = self._fixed = None
        self.levels = []
        self._show()

    def forget(self):
        """The scene was closed."""
        self.layers.forget()
        self._node = None
        self.end()

    def _show(self, event=None):
        self.label.visible = self.curve.visible = bool(self.levels)
        if not self.levels:
            return
        similarity, folded = self.levels[-1]
        self.label.text = _("Level {level} of {levels}: similarity {similarity:.3f}, folded {folded:.2f} %").format(
            level=event["level"], levels=event["levels"], similarity=similarity, folded=folded
        )
        self.curve.pixmap = picture(self.levels)


def picture(levels):
    """The levels as lines in a QPixmap: similarity blue, folding red, each from its smallest to its largest value."""
    pixmap = qt.QPixmap(WIDTH, HEIGHT)
    pixmap.fill(qt.QColor("white"))
    painter = qt.QPainter()
    painter.begin(pixmap)
    step = (WIDTH - 20) // max(1, len(levels) - 1)
    for column, color in ((0, "#1f4e9c"), (1, "#b02010")):
        values = [level[column] for level in levels]
        low, high = min(values), max(values)
        spread = max(high - low, 1e-9)
        heights = [HEIGHT - 8 - round((HEIGHT - 16) * (value - low) / spread) for value in values]
        pen = qt.QPen(qt.QColor(color))
        pen.setWidth(2)
        painter.setPen(pen)
        for k, y in enumerate(heights):
            x = 10 + k * step
            painter.drawEllipse(x - 2, y - 2, 4, 4)
            if k:
                painter.drawLine(x - step, heights[k - 1], x, y)
    painter.end()
    return pixmap
