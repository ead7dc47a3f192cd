"""The tie between the parameter node and the widgets, which can be cut without a trace."""

import vtk


class Link:
    """Widgets show the parameters, and parameters follow the widgets, until :meth:`cut`.

    Up to Slicer 5.10 ``disconnectGui()`` leaves the observer that ``connectGui()`` has made on the node. Its function
    dies with the wrapper, VTK calls it when the node changes next, and the application ends. So every observer made
    here is remembered and removed.

    Args:
        parameters: a parameter node wrapper.
        ui: widgets with ``SlicerParameterName``.
        onModified: called with (caller, event) after any change of the node.
    """

    def __init__(self, parameters, ui, onModified):
        self._parameters, self._tags = parameters, []
        add = parameters.AddObserver

        def remembered(event, callback, priority=0.0):
            self._tags.append(add(event, callback, priority))
            return self._tags[-1]

        parameters.AddObserver = remembered  # shadows the class's function for this one call
        try:
            self._gui = parameters.connectGui(ui)
            remembered(vtk.vtkCommand.ModifiedEvent, onModified)
        finally:
            del parameters.AddObserver

    def cut(self):
        """The widgets and the function hear nothing of the node any more."""
        self._parameters.disconnectGui(self._gui)
        for tag in self._tags:
            self._parameters.RemoveObserver(tag)
        self._tags = []
