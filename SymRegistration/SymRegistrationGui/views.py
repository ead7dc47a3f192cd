"""Looking at a result: compare views, maps over the scan, the deformation itself. One click each, and one to go back.

All slice views follow, through their composite nodes; no view widget is touched, so this works without a main window.
"""

import numpy as np
import qt
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.job import RegistrationError
from SymRegistrationLib.quality import outputs

from . import colors, nodes, results
from .layers import Layers
from .steps import StepRunner, pieces

COMPARE = ("blend", "reveal", "checkerboard", "flicker", "difference")
#: Modes whose picture is computed anew when the result or the slider changes.
COMPUTED = ("reveal", "checkerboard", "difference")
MAPS = outputs.names("map")
FLICKER = ("flicker", "previous")
FLICKER_MS = 500


class Views:
    """What the slice views show of a run.

    Args:
        scene: the vtkMRMLScene.
        onError: gets an exception when something cannot be shown.
    """

    def __init__(self, scene, onError=lambda error: None):
        self.scene = scene
        self.mode = ""
        self.value = 0.5
        self.onError = onError
        self.onLegend = lambda text: None
        self._run = None
        self.layers = Layers(scene)
        self._legendOf = None
        self._steps = StepRunner()
        self._timer = qt.QTimer()
        self._timer.interval = FLICKER_MS
        self._timer.timeout.connect(self._flick)

    def composites(self):
        return self.layers.composites()

    def show(self, mode, run, value=None):
        """Show one of COMPARE or MAPS, or "" to go back to what was shown before.

        Args:
            value: 0 to 1: opacity of blend and maps, tile size of the checkerboard; None = as it was.

        Raises:
            RegistrationError: a part that is needed was not made or was deleted.
        """
        parts = {} if not mode else self._parts(mode, run)
        self._stop()
        if value is not None:
            self.value = value
        self.mode, self._run = mode, run
        if not mode:
            self.layers.restore()
            self.onLegend("")
            return
        getattr(self, f"_show_{mode}", self._showMap)(run, parts)

    def setValue(self, value):
        """Follow the slider."""
        self.value = value
        if self.mode in ("blend", *MAPS, "difference"):
            self.layers.fade(value)
        elif self.mode in ("reveal", "checkerboard") and not self._steps.busy:
            self._compute(self._run, self._parts(self.mode, self._run))

    def refresh(self):
        """The result that is shown has changed."""
        if self.mode in COMPUTED:
            self.show(self.mode, self._run)

    def pause(self):
        """Nothing moves while the module is not shown: a flicker stops at the registered scan."""
        if self.mode in FLICKER and self._timer.active:
            self._timer.stop()
            self.layers.fade(1.0)

    def resume(self):
        """The module is shown again."""
        if self.mode in FLICKER:
            self._timer.start()

    def forget(self):
        """The scene was closed: nothing to go back to."""
        self._stop()
        self.mode, self._run, self._legendOf = "", None, None
        self.layers.forget()
        self.onLegend("")

    def showDeformation(self, run, grid, glyphs):
        """Deformation grid and arrows of the forward transform, in slice and 3-D views."""
        node = run.node("forward")
        if node is None:
            raise RegistrationError(_("The transform of this registration was deleted."), _("Register again."))
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        with slicer.util.NodeModify(display):
            if grid or glyphs:
                kind = slicer.vtkMRMLTransformDisplayNode
                display.SetVisualizationMode(kind.VIS_MODE_GRID if grid else kind.VIS_MODE_GLYPH)
                display.SetGridSpacingMm(12.0)
                display.SetGlyphSpacingMm(10.0)
                display.SetAndObserveRegionNode(run.node("fixed"))
            display.SetVisibility(bool(grid or glyphs))
            display.SetVisibility2D(bool(grid or glyphs))
            display.SetVisibility3D(False)

    # ------------------------------------------------------------------------------------------ modes

    def _parts(self, mode, run):
        wanted = ("fixed", "warped_moving") if mode in COMPARE else (mode,)
        wanted = ("previous", "warped_moving") if mode == "previous" else wanted
        parts = {name: run.node(name) for name in wanted}
        for name, node in parts.items():
            if node is None:
                raise RegistrationError(
                    _("{part}: not made in this registration.").format(part=_name(name)),
                    _("Switch it on under Outputs and register again."),
                )
        return parts

    def _show_blend(self, run, parts):
        self.layers.show(parts["fixed"], parts["warped_moving"], self.value)
        self.onLegend(_("Left: fixed scan. Right: moving scan, registered."))

    def _show_flicker(self, run, parts):
        self.layers.show(parts["fixed"], parts["warped_moving"], 1.0)
        self._timer.start()
        self.onLegend(_("Fixed and registered moving scan in turn: what jumps is not aligned."))

    def _flick(self):
        if self._run.node("warped_moving") is None:
            self._stop()
            return
        shown = self.composites()
        self.layers.fade(0.0 if shown and shown[0].GetForegroundOpacity() > 0.5 else 1.0)

    def _show_previous(self, run, parts):
        self.layers.show(parts["previous"], parts["warped_moving"], 1.0)
        self._timer.start()
        self.onLegend(_("The moving scan as it was registered before the last step, and as it is now, in turn."))

    def _show_reveal(self, run, parts):
        self._compute(run, parts)
        self.onLegend(_("The slider moves the border: fixed scan before it, registered moving scan behind it."))

    def _show_checkerboard(self, run, parts):
        self._compute(run, parts)
        self.onLegend(_("Tiles of the fixed and of the registered moving scan: edges should run on across tiles."))

    def _show_difference(self, run, parts):
        self._compute(run, parts)
        self.onLegend(colors.legendText("difference"))

    def _showMap(self, run, parts):
        node = parts[self.mode]
        background = run.node("fixed")
        told = run.metrics.get("uncertainty") if self.mode == "uncertainty" else None
        legend = colors.styleMap(node, outputs.of(self.mode), shownMaximum(run.metrics, self.mode, node))
        self.onLegend(legend + (results.worthText(told) if told else ""))
        self.layers.show(background, node, self.value)
        colors.showLegend(node, True)
        self._legendOf = node

    # ------------------------------------------------------------------------------------------ computed comparisons

    def _compute(self, run, parts):
        self._steps.start(
            comparison(self.mode, parts["fixed"], parts["warped_moving"], self.value),
            lambda fill: self._computed(run, parts, fill),
            self.onError,
        )

    def _computed(self, run, parts, fill):
        if parts["fixed"].GetScene() is None or run.table.GetScene() is None:
            return
        node = run.node("comparison")
        if node is None:
            node = self.scene.AddNewNodeByClass(
                "vtkMRMLScalarVolumeNode", self.scene.GenerateUniqueName(_("Comparison"))
            )
            node.SetSaveWithScene(False)
            run.setNode("comparison", node, True)
            run.own([node])
        fill(node)
        if self.mode == "difference":
            colors.style(node, "difference", -100.0, 100.0)
            self.layers.show(parts["fixed"], node, self.value)
        else:
            node.CreateDefaultDisplayNodes()
            node.GetDisplayNode().SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
            node.GetDisplayNode().AutoWindowLevelOff()
            node.GetDisplayNode().SetWindowLevelMinMax(0.0, 255.0)
            self.layers.show(node, None, 0.0)

    def _stop(self):
        self._timer.stop()
        self._steps.cancel()
        if self._legendOf is not None and self._legendOf.GetScene() is not None:
            colors.showLegend(self._legendOf, False)
        self._legendOf = None


def _name(part):
    """What people call a part of a run."""
    others = {"fixed": _("Fixed volume"), "previous": _("Result before the last step")}
    return others.get(part) or _(outputs.of(part).title)


#: Where the metrics tell below which mm 95 % of a map lie inside the scan.
_P95 = {"inverse_consistency": ("quality", "ice_p95_mm"), "uncertainty": ("uncertainty", "p95_mm")}


def shownMaximum(metrics, mode, node):
    """Upper end of a sequential color scale: a round number above what 95 % of the scan's content have."""
    part, key = _P95.get(mode, ("", ""))
    high = (metrics.get(part) or {}).get(key)
    if high is None:  # the metrics do not tell: what 95 % of all voxels have
        high = float(np.percentile(nodes.volumeArray(node)[::4, ::4, ::4], 95))
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
        if 1.2 * high <= step:
            return step
    return 100.0


def comparison(mode, fixedNode, warpedNode, value):
    """Generator: checkerboard or reveal (uint8), or difference (int16, percent of the shown range); returns what fills
    a node. The border of ``reveal`` lies oblique to all three axes, so it is seen in slices of every orientation.
    """
    fixed, grid = nodes.worldVolume(fixedNode)
    warped, warpedGrid = nodes.worldVolume(warpedNode)
    if not grid.same_as(warpedGrid, 0.01):
        raise RegistrationError(
            _("'{a}' and '{b}' do not lie on the same grid any more.").format(
                a=fixedNode.GetName(), b=warpedNode.GetName()
            ),
            _("Register again."),
        )
    ranges = [_shownRange(node, array) for node, array in ((fixedNode, fixed), (warpedNode, warped))]
    if mode == "difference":
        ranges[1] = _matchedRange(fixed, warped, ranges)
    out = np.empty(grid.shape, np.int16 if mode == "difference" else np.uint8)
    # a tile is between 1/3 and 1/20 of the longest side, equal in mm along all axes
    tile = max(grid.spacing * grid.shape) / (3 + 17 * value)
    depth, height, width = grid.shape
    parity = [np.floor(np.arange(n) * s / tile).astype(int) for n, s in zip(grid.shape, grid.spacing)]
    for start, stop in pieces(grid.shape[0], 4 * fixed[0].size):
        one, two = (
            (np.clip((array[start:stop].astype(np.float32) - low) / (high - low), 0, 1))
            for array, (low, high) in zip((fixed, warped), ranges)
        )
        if mode == "difference":
            out[start:stop] = np.rint(100 * (one - two))
        elif mode == "reveal":
            along = (np.arange(start, stop) / depth)[:, None, None] + (np.arange(height) / height)[:, None]
            behind = (along + np.arange(width) / width) / 3 >= value
            out[start:stop] = np.where(behind, two, one) * 255
        else:
            odd = (parity[0][start:stop, None, None] + parity[1][:, None] + parity[2]) % 2 == 1
            out[start:stop] = np.where(odd, two, one) * 255
        yield
    return (yield from nodes.volumeFiller(out, grid))


def _matchedRange(fixed, warped, ranges):
    """The intensities of the warped scan that correspond to the shown range of the fixed one, by a straight line.

    Two scanners scale differently; without this the difference would show the scanners instead of the anatomy. Scans of
    opposite contrast have no such line; they are compared as they are shown.
    """
    one, two = fixed[::4, ::4, ::4].astype(float).ravel(), warped[::4, ::4, ::4].astype(float).ravel()
    (low, high), (warpedLow, warpedHigh) = ranges
    seen = (one > low) & (one < high) & (two > warpedLow) & (two < warpedHigh)
    if seen.sum() < 100 or np.corrcoef(one[seen], two[seen])[0, 1] < 0.3:
        return ranges[1]
    # the line through the means with the ratio of the spreads: neither scan is the "given" one
    scale = two[seen].std() / one[seen].std()
    return two[seen].mean() + scale * (low - one[seen].mean()), two[seen].mean() + scale * (high - one[seen].mean())


def _shownRange(node, array):
    """Lowest and highest intensity as displayed, so that both scans are compared as the user sees them."""
    display = node.GetDisplayNode()
    if display is not None and display.GetWindow() > 0:
        return display.GetLevel() - display.GetWindow() / 2, display.GetLevel() + display.GetWindow() / 2
    low, high = np.percentile(array[::4, ::4, ::4], (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))
