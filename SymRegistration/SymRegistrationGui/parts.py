"""The library's table of outputs as the panel shows it: parameters, rows of the section *Outputs*, buttons of maps.

A new output is an entry of :data:`SymRegistrationLib.quality.outputs.OUTPUTS` and nothing here.
"""

import qt
import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.quality import outputs

#: Words in names of parameters and widgets that are not the output's name; scenes saved before know them.
_WORDS = {"inverse_consistency": "Consistency"}
#: Parameters that ask for an output by more than yes or no.
_ASKED = {"uncertainty": "uncertaintyRuns"}
#: Buttons in a row.
_ABREAST = 2


def _word(output):
    return _WORDS.get(output.name) or "".join(word.capitalize() for word in output.name.split("_"))


def node(output):
    """Parameter that holds the node which an output updates; None there = a new node."""
    return f"output{_word(output)}"


def switch(output):
    """Parameter that says whether an output is made; "" for those that always are."""
    return "" if output.kind == "transform" else _ASKED.get(output.name, f"make{_word(output)}")


def button(output):
    """Name of the button that shows a map."""
    word = _word(output)
    return f"{word[0].lower()}{word[1:]}Button"


#: part of a run -> (parameter of its output node, parameter that switches it, "" = always)
OUTPUTS = {output.name: (node(output), switch(output)) for output in outputs.OUTPUTS}
#: Button of a map -> part of a run.
MAPS = {button(output): output.name for output in outputs.OUTPUTS if output.kind == "map"}


def withOutputs(cls):
    """Class decorator, beneath ``parameterNodeWrapper``: the parameters of every output."""
    for output in outputs.OUTPUTS:
        transform = output.kind == "transform"
        cls.__annotations__[node(output)] = slicer.vtkMRMLTransformNode if transform else slicer.vtkMRMLScalarVolumeNode
        if switch(output) and output.name not in _ASKED:
            cls.__annotations__[switch(output)] = bool
            setattr(cls, switch(output), output.usual)
    return cls


def addRows(ui):
    """A row per output in the section *Outputs*; returns the node selectors, which need a scene."""
    form, made = ui.outputsCollapsibleButton.layout(), []
    for output in outputs.OUTPUTS:
        ticked = switch(output) and output.name not in _ASKED
        title = (qt.QCheckBox if ticked else qt.QLabel)(_("{title}:").format(title=_(output.title)))
        title.toolTip = _(output.meaning)
        if ticked:
            _named(ui, title, f"{switch(output)}CheckBox", switch(output))
        selector = slicer.qMRMLNodeComboBox()
        transform = output.kind == "transform"
        selector.nodeTypes = ["vtkMRMLTransformNode" if transform else "vtkMRMLScalarVolumeNode"]
        selector.showChildNodeTypes = False
        for able in ("noneEnabled", "addEnabled", "removeEnabled", "renameEnabled", "selectNodeUponCreation"):
            setattr(selector, able, True)
        selector.noneDisplay = _("New transform") if transform else _("New volume")
        selector.toolTip = _(
            "A new node, or one of yours, which is overwritten. After a run: what it made, so that the next run "
            "updates it."
        )
        _named(ui, selector, f"{node(output)}Selector", node(output))
        form.addRow(title, selector)
        made.append(selector)
    return made


def addButtons(ui):
    """A button per map beneath *Maps over the fixed scan*."""
    grid = ui.mapsWidget.layout()
    for index, (name, part) in enumerate(MAPS.items()):
        made = qt.QPushButton(_(outputs.of(part).title))
        made.toolTip = _(outputs.of(part).meaning)
        made.checkable = True
        _named(ui, made, name)
        grid.addWidget(made, index // _ABREAST, index % _ABREAST)


def _named(ui, widget, name, parameter=""):
    """As if the widget came from the .ui file."""
    widget.objectName = name
    if parameter:
        widget.setProperty("SlicerParameterName", parameter)
    setattr(ui, name, widget)
