"""Color tables of the maps: made once per scene, saved with it; and their legends as rich text."""

import slicer
from slicer.i18n import tr as _

_ATTRIBUTE = "SymRegistration.Colors"
#: Nothing else in the maps has this color.
FOLDED = (1.0, 0.0, 1.0)
#: Largest volume factor of the Jacobian map; the smallest is its inverse.
LARGEST = 4.0
_SHRINK = ((1.0, 1.0, 1.0), (0.45, 0.68, 0.86), (0.05, 0.20, 0.55))
_GROW = ((1.0, 1.0, 1.0), (0.96, 0.60, 0.35), (0.60, 0.05, 0.05))
_AMOUNT = ((0.05, 0.03, 0.20), (0.25, 0.25, 0.60), (0.10, 0.60, 0.55), (0.55, 0.80, 0.30), (1.0, 0.92, 0.30))
_ENTRIES = 256


def _ramp(stops, share):
    """Color at ``share`` (0 to 1) of a row of colors."""
    position = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    part = position - low
    return tuple(a + (b - a) * part for a, b in zip(stops[low], stops[low + 1]))


def jacobianColor(value):
    """Color of a volume factor: logarithmic around 1, magenta where space is folded."""
    import math

    if value <= 0:
        return FOLDED
    share = math.log(value) / math.log(LARGEST)
    return _ramp(_GROW if share > 0 else _SHRINK, abs(share))


def amountColor(share):
    """Color of an error in mm, ``share`` of the largest shown."""
    return _ramp(_AMOUNT, share)


def differenceColor(share):
    """Color of a difference, ``share`` 0 = fixed darker, 0.5 = equal, 1 = fixed brighter."""
    return _ramp((_SHRINK[2], _SHRINK[1], _SHRINK[0], _GROW[1], _GROW[2]), share)


def allNodes(scene):
    """The color tables of this module in a scene."""
    count = scene.GetNumberOfNodesByClass("vtkMRMLColorTableNode")
    found = [scene.GetNthNodeByClass(index, "vtkMRMLColorTableNode") for index in range(count)]
    return [node for node in found if node.GetAttribute(_ATTRIBUTE)]


def colorNode(scene, kind):
    """The color table ``jacobian``, ``amount`` or ``difference`` of a scene; made when missing."""
    for node in allNodes(scene):
        if node.GetAttribute(_ATTRIBUTE) == kind:
            return node
    name = {"jacobian": _("Volume change"), "amount": _("Error in mm"), "difference": _("Difference")}[kind]
    node = scene.AddNewNodeByClass("vtkMRMLColorTableNode", name)
    node.SetAttribute(_ATTRIBUTE, kind)
    color = {
        "jacobian": lambda share: jacobianColor(share * LARGEST),
        "amount": amountColor,
        "difference": differenceColor,
    }[kind]
    with slicer.util.NodeModify(node):
        node.SetTypeToUser()
        node.SetNumberOfColors(_ENTRIES)
        for entry in range(_ENTRIES):
            share = entry / (_ENTRIES - 1)
            node.SetColor(entry, f"{share * LARGEST if kind == 'jacobian' else share:.2f}", *color(share), 1.0)
    node.AddDefaultStorageNode()
    return node


def style(node, kind, lowest, highest):
    """Show a volume node with a color table between two values, with Slicer's own legend ready."""
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(colorNode(node.GetScene(), kind).GetID())
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(lowest, highest)


def styleMap(node, output, highest):
    """Show the node of a map in its colors and return the legend as rich text.

    Args:
        output: the :class:`SymRegistrationLib.quality.outputs.Output` with kind ``map``.
        highest: upper end of a sequential scale.
    """
    if output.colours == "diverging":
        style(node, "jacobian", 0.0, LARGEST)
        return legendText("jacobian")
    style(node, "amount", 0.0, highest)
    return legendText("amount", highest, output.unit)


def showLegend(node, visible):
    """Slicer's legend in the views; versions without it show the one of the panel only."""
    logic = getattr(slicer, "vtkSlicerColorLogic", None)
    if logic is None or node.GetDisplayNode() is None:
        return
    legend = logic.GetColorLegendDisplayNode(node)
    if legend is None and visible:
        legend = logic.AddDefaultColorLegendDisplayNode(node)
    if legend is not None:
        legend.SetTitleText(node.GetName().split(",")[0])
        legend.SetLabelFormat("%.2f")
        legend.SetSize(0.12, 0.4)
        for style in (legend.GetTitleTextProperty(), legend.GetLabelTextProperty()):
            style.SetFontSize(10)
        legend.SetVisibility(visible)


def _cell(color, text="&nbsp;"):
    code = "#" + "".join(f"{round(255 * c):02x}" for c in color)
    dark = sum(color) < 1.5
    return (
        f'<td width="24" align="center" bgcolor="{code}" style="color:{"#ffffff" if dark else "#000000"}">{text}</td>'
    )


def legendText(kind, highest=None, unit="mm"):
    """The legend of a map as rich text; ``highest`` in ``unit``."""
    if kind == "jacobian":
        values = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
        cells = "".join(
            _cell(jacobianColor(v), f"{v:g}" if v in (0.25, 0.5, 1.0, 2.0, 4.0) else "&nbsp;") for v in values
        )
        return (
            f'<table cellspacing="0" cellpadding="2"><tr>{_cell(FOLDED)}<td>&nbsp;{_("folded")}&nbsp;&nbsp;</td>'
            f"{cells}</tr></table>" + _("Volume factor: blue shrinks, red grows")
        )
    if kind == "difference":
        cells = "".join(_cell(differenceColor(k / 8)) for k in range(9))
        ends = [f"<td>{_('moving brighter')}&nbsp;</td>", f"<td>&nbsp;{_('fixed brighter')}</td>"]
        return f'<table cellspacing="0" cellpadding="2"><tr>{ends[0]}{cells}{ends[1]}</tr></table>'
    cells = "".join(_cell(amountColor(k / 8), f"{highest * k / 8:.2g}" if k % 4 == 0 else "&nbsp;") for k in range(9))
    return f'<table cellspacing="0" cellpadding="2"><tr>{cells}<td>&nbsp;{unit}</td></tr></table>'
