"""What the parts of the panel have in common."""


class Section:
    """A part of the panel.

    Args:
        ui: child widgets by name.
        panel: the :class:`~.widget.Panel`, for state, logic and messages.
    """

    def __init__(self, ui, panel):
        self.ui, self.panel, self.logic = ui, panel, panel.logic


def fitRows(table, most):
    """Make a table as high as its rows, of which at most ``most`` are seen at once."""
    table.resizeRowsToContents()
    rows = sum(table.rowHeight(row) for row in range(min(table.rowCount, most)))
    table.minimumHeight = table.maximumHeight = table.horizontalHeader().sizeHint.height() + rows + 2 * table.frameWidth


def fill(box, pairs):
    """Add (value, text) pairs to a combo box."""
    for value, text in pairs:
        box.addItem(text, value)


def follow(box, choose, parameter):
    """What the user picks in a combo box becomes the value of a parameter: ``choose(parameter, value)``."""
    box.currentIndexChanged.connect(lambda *_unused: choose(parameter, box.itemData(box.currentIndex)))
