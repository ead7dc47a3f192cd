"""What can be chosen, known without torch: methods, presets, kinds of contrast and start, as (value, text) pairs."""

from pathlib import Path

from slicer.i18n import tr as _

import SymRegistrationLib
from SymRegistrationLib.registration import catalogue
from SymRegistrationLib.registration.presets import presets as known_presets

_LIBRARY = Path(SymRegistrationLib.__file__).parent


def methods():
    """One dictionary per method: name, title, description, publication, needs_weights, weights_here."""
    weights = _LIBRARY / "model_weights"
    return [
        {**method, "weights_here": any(weights.glob(f"{method['name']}-*.safetensors"))}
        for method in catalogue.known().values()
    ]


def usable(method, weightsFile=""):
    """True when a method can run with what is here."""
    return not method["needs_weights"] or method["weights_here"] or bool(weightsFile)


def presets():
    return [(name, _(preset.title)) for name, preset in known_presets().items()]


def similarities():
    return [
        ("auto", _("Decide from the scans")),
        ("lncc", _("Same contrast (e.g. both T1)")),
        ("mind", _("Different contrasts (e.g. CT and MR)")),
    ]


def initials():
    return [
        ("affine", _("Rotate, shift and scale (affine)")),
        ("rigid", _("Rotate and shift (rigid)")),
        ("centre", _("Align the centers")),
        ("none", _("None: the scans are aligned")),
        ("transform", _("Start from a transform")),
    ]


def devices(known):
    """(value, text) pairs; ``known`` is what the worker found, empty before its first start."""
    pairs = [("auto", _("Automatic"))]
    for device in known or [{"name": "cpu"}]:
        title = device.get("title", _("CPU"))
        memory = _(", {gb:.0f} GB").format(gb=device["memory_gb"]) if "memory_gb" in device else ""
        pairs.append((device["name"], f"{title}{memory}"))
    return pairs
