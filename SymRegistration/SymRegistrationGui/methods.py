"""What can be chosen, known without torch: methods, presets, kinds of contrast and start, as (value, text) pairs."""

from pathlib import Path

from slicer.i18n import tr as _

import SymRegistrationLib
from SymRegistrationLib.job import ANATOMIES
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
    ]


#: What a preset by anatomy may set that the panel shows, with what is there without one.
ANATOMY_DEFAULTS = {"initial": "affine", "metric": "auto", "preset": "default", "stiffness": 1.0}


def anatomies():
    """(name, title, reason) of every preset by anatomy that the library knows; the one without options first."""
    found = [(name, _(entry["title"]), _(entry.get("reason", ""))) for name, entry in _anatomies().items()]
    return sorted(found, key=lambda entry: bool(_anatomies()[entry[0]]["options"]))


def anatomyOptions(name):
    """Options of the library that a preset sets; {} for one that is not known here."""
    return dict(_anatomies().get(name, {}).get("options", {}))


def hiddenOptions(name):
    """Those that no widget shows: they go along with the preset."""
    shown = {*ANATOMY_DEFAULTS, "method"}
    return {key: value for key, value in anatomyOptions(name).items() if key not in shown}


def _anatomies():
    return ANATOMIES


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
