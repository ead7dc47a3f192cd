"""What one registration leaves in the scene: nodes that know of each other, in one folder, found again after loading.

The results table is the anchor of a run. It holds a node reference per part, the metrics as text node, and says which
nodes the run made (those go when the run is removed; nodes that the user had chosen stay).
"""

import json
import time
import uuid

import slicer
from slicer.i18n import tr as _

from SymRegistrationLib.quality import outputs

from . import colors
from .nodes import discard

PREFIX = "SymRegistration."
#: Parts in the order of the folder; the names are the worker's.
PARTS = outputs.names()
TRANSFORMS = outputs.names("transform")
_RUN = PREFIX + "Run"


class Run:
    """One registration in the scene.

    Args:
        table: its vtkMRMLTableNode.
    """

    def __init__(self, table):
        self.table = table

    @property
    def id(self):
        return self.table.GetAttribute(_RUN)

    @property
    def scene(self):
        return self.table.GetScene()

    def node(self, part):
        """The node of a part (PARTS, "fixed", "moving", "metrics", "report", "comparison"), or None."""
        return self.table.GetNodeReference(PREFIX + part)

    def setNode(self, part, node, created):
        """Tie a node to the run; ``created``: the run made it."""
        self.table.SetNodeReferenceID(PREFIX + part, node.GetID())
        if created:
            node.SetAttribute(_RUN, self.id)

    def own(self, nodes):
        """Nodes made later for this run: they lie in its folder and go with it."""
        for node in nodes:
            node.SetAttribute(_RUN, self.id)
            self._intoFolder(node)

    @property
    def metrics(self):
        """The worker's metrics, an empty dictionary when they are gone."""
        node = self.node("metrics")
        try:
            return json.loads(node.GetText()) if node is not None else {}
        except ValueError:
            return {}

    def setMetrics(self, metrics):
        self.setText("metrics", json.dumps(metrics))

    def setText(self, part, text):
        """Keep a text with the run; hidden, saved with the scene."""
        node = self.node(part)
        if node is None:
            node = self.scene.AddNewNodeByClass("vtkMRMLTextNode", f"{self.table.GetName()} {part}")
            node.SetHideFromEditors(1)
            self.setNode(part, node, True)
            self.own([node])
        node.SetText(text)

    def text(self, part):
        """A text that is kept with the run, "" when there is none."""
        node = self.node(part)
        return node.GetText() or "" if node is not None else ""

    def dropText(self, part):
        """Take a kept text out of the scene."""
        node = self.node(part)
        self.table.RemoveNodeReferenceIDs(PREFIX + part)
        if node is not None:
            discard(node)

    def created(self):
        """All nodes that this run made, the table last."""
        nodes = [self.scene.GetNthNode(index) for index in range(self.scene.GetNumberOfNodes())]
        return [n for n in nodes if n.GetAttribute(_RUN) == self.id and n is not self.table] + [self.table]

    def remove(self):
        """Take everything that the run made out of the scene; what the user had chosen as output stays."""
        scene, identity = self.scene, self.id
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
        folder = self._folder()
        for node in self.created():
            discard(node)
        if folder and hierarchy.GetItemAttribute(folder, _RUN) == identity:
            hierarchy.RemoveItem(folder, False, False)
        if not runs(scene):
            for node in colors.allNodes(scene):
                discard(node)

    def _folder(self):
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self.scene)
        item = hierarchy.GetItemByDataNode(self.table)
        parent = hierarchy.GetItemParent(item) if item else 0
        return parent if parent and hierarchy.GetItemAttribute(parent, _RUN) == self.id else 0

    def _intoFolder(self, node):
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self.scene)
        folder = self._folder()
        if not folder:
            folder = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), self.table.GetName())
            hierarchy.SetItemAttribute(folder, _RUN, self.id)
            self._place(hierarchy, folder, self.table)
        if node is not self.table:
            self._place(hierarchy, folder, node)

    @staticmethod
    def _place(hierarchy, folder, node):
        item = hierarchy.GetItemByDataNode(node)
        if item:
            hierarchy.SetItemParent(item, folder)
        else:
            hierarchy.CreateItem(folder, node)


def runs(scene):
    """All runs of a scene, oldest first."""
    found = []
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLTableNode")):
        table = scene.GetNthNodeByClass(index, "vtkMRMLTableNode")
        if table.GetAttribute(_RUN) and table.GetNodeReference(PREFIX + "forward") is not None:
            found.append(Run(table))
    return sorted(found, key=lambda run: run.table.GetAttribute(PREFIX + "Time") or "")


def isResultTable(node):
    return node is not None and node.IsA("vtkMRMLTableNode") and bool(node.GetAttribute(_RUN))


def commit(fixedNode, movingNode, fillers, chosen, metrics):
    """Put the results of a registration into the scene; quick, and never half.

    Args:
        fillers: part -> function that fills a node.
        chosen: part -> node to be updated, or absent for a new one; "table" -> the table of a run that is updated.
        metrics: of the worker.

    Returns:
        The :class:`Run`.
    """
    scene = fixedNode.GetScene()
    table = chosen.get("table")
    if table is None:
        table = scene.AddNewNodeByClass(
            "vtkMRMLTableNode", _unique(scene, _("Registration of {moving} to {fixed}"), fixedNode, movingNode)
        )
    if not table.GetAttribute(_RUN):
        table.SetAttribute(_RUN, uuid.uuid4().hex)
    table.SetAttribute(PREFIX + "Time", f"{time.time():.3f}")
    run = Run(table)
    run.setText("report", "")  # the one of an earlier run would be wrong now
    nodes = [table]
    for part in PARTS:
        if part not in fillers:
            table.RemoveNodeReferenceIDs(PREFIX + part)
        else:
            node = chosen.get(part) or run.node(part)
            new = node is None
            if new:
                node = _newNode(scene, part, fixedNode, movingNode)
                _style(node, part, fixedNode, movingNode)
                nodes.append(node)
            fillers[part](node)
            run.setNode(part, node, new)
    _link(run, fixedNode, movingNode)
    run.own(nodes)
    run.setMetrics(metrics)
    return run


def _unique(scene, pattern, fixedNode, movingNode):
    return scene.GenerateUniqueName(pattern.format(fixed=fixedNode.GetName(), moving=movingNode.GetName()))


def partName(part):
    """Pattern of a new node's name."""
    output = outputs.of(part)
    if output.kind == "map":
        return _("{title}, {{moving}} to {{fixed}}").format(title=_(output.title))
    if output.kind == "image":
        return _("{moving} on {fixed}") if output.grid == "fixed" else _("{fixed} on {moving}")
    return _("{moving} to {fixed}") if output.grid == "fixed" else _("{fixed} to {moving}")


def _newNode(scene, part, fixedNode, movingNode):
    kind = "vtkMRMLTransformNode" if part in TRANSFORMS else "vtkMRMLScalarVolumeNode"
    return scene.AddNewNodeByClass(kind, _unique(scene, partName(part), fixedNode, movingNode))


def _style(node, part, fixedNode, movingNode):
    """Display nodes that look as the user expects: a warped scan like its source, maps in their
    colors, transforms hidden.

    Comes before the voxels: an automatic window would count all of them, which takes long enough to be felt.
    """
    output = outputs.of(part)
    if output.kind == "map":
        colors.styleMap(node, output, 1.0)
        return
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    if output.kind == "transform":
        display.SetVisibility(False)
        return
    display.AutoWindowLevelOff()
    like = (movingNode if output.grid == "fixed" else fixedNode).GetDisplayNode()
    if like is not None:
        display.SetAndObserveColorNodeID(like.GetColorNodeID())
        display.SetWindowLevel(like.GetWindow(), like.GetLevel())
        display.SetInterpolate(like.GetInterpolate())


def _link(run, fixedNode, movingNode):
    """Node references that other modules understand, and one of our own between forward and inverse."""
    roles = (
        slicer.vtkMRMLTransformNode.GetFixedNodeReferenceRole(),
        slicer.vtkMRMLTransformNode.GetMovingNodeReferenceRole(),
    )
    forward, inverse = run.node("forward"), run.node("inverse")
    for node, target, source in ((forward, fixedNode, movingNode), (inverse, movingNode, fixedNode)):
        if node is not None:
            node.SetNodeReferenceID(roles[0], target.GetID())
            node.SetNodeReferenceID(roles[1], source.GetID())
    if forward is not None and inverse is not None:
        forward.SetNodeReferenceID(PREFIX + "inverseOf", inverse.GetID())
        inverse.SetNodeReferenceID(PREFIX + "inverseOf", forward.GetID())
