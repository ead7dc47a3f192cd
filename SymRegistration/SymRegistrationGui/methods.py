"""What can be chosen, known without torch: methods, presets, kinds of contrast and start, as (value, text) pairs."""

from pathlib import Path

from slicer.i18n import tr as _

import SymRegistrationLib
from SymRegistrationLib.job import ANATOMIES, InputError
from SymRegistrationLib.registration import anatomies as known_anatomies
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


def metrics():
    return [
        ("auto", _("Decide from the scans")),
        ("lncc", _("Same contrast (e.g. both T1)")),
        ("mind", _("Different contrasts (e.g. CT and MR)")),
        ("mi", _("Different contrasts, by mutual information")),
        ("ncc", _("Same contrast, other scale of brightness")),
        ("mse", _("Same scanner and settings")),
    ]


#: What a preset by anatomy may set that the panel shows: option -> (parameter, its value without a preset).
SHOWN = {
    "initial": ("initial", "affine"),
    "similarity": ("metric", "auto"),
    "preset": ("preset", "default"),
    "stiffness": ("stiffness", 1.0),
}


def anatomies():
    """(name, title, reason) of every preset by anatomy, shipped or the user's own; the one without options first."""
    found = sorted(_anatomies().values(), key=lambda one: bool(one.options))
    return [(one.name, _(one.title), _(one.reason)) for one in found]


def anatomyOptions(name):
    """Options of the library that a preset sets; {} for one that is not known here."""
    found = _anatomies().get(name)
    return dict(found.options) if found is not None else {}


def hiddenOptions(name):
    """Those that no widget shows: they go along with the preset."""
    return {key: value for key, value in anatomyOptions(name).items() if key not in {*SHOWN, "method"}}


def _anatomies():
    try:
        return known_anatomies.anatomies()
    except InputError:  # the user's file is damaged, which the command line tells; the shipped ones are there
        return {name: known_anatomies.Anatomy(name, **entry) for name, entry in ANATOMIES.items()}


def linearKinds():
    """(name, title) of the methods that only align."""
    return [(name, entry["title"]) for name, entry in catalogue.known().items() if entry["linear"]]


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
