"""What can be chosen, known without torch: methods, presets, kinds of contrast and start, as (value, text) pairs."""

import re
import unicodedata
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


def anatomies():
    """(name, title, reason) of every preset by anatomy, shipped or the user's own; the one without options first."""
    found = sorted(_anatomies().values(), key=lambda one: bool(one.options))
    return [(one.name, _(one.title), _(one.reason)) for one in found]


def anatomyOptions(name):
    """Options of the library that a preset sets; {} for one that is not known here."""
    found = _anatomies().get(name)
    return dict(found.options) if found is not None else {}


def ownAnatomies():
    """Names of the presets that are the user's own and can be deleted."""
    return {one.name for one in _anatomies().values() if one.source}


def saveAnatomy(title, options):
    """Keep a preset of the user's own under a name that follows from ``title``; one of that name is replaced.

    Returns:
        The name.

    Raises:
        InputError: the title gives no name, or that of a preset which comes with the extension; or the file is damaged.
        RegistrationError: the disk refuses.
    """
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:60]
    if not name:
        raise InputError(_("'{title}' has no letters to make a name of.").format(title=title), _("Choose another one."))
    known_anatomies.save(name, title, options, _("saved in the Slicer panel"))
    return name


def removeAnatomy(name):
    """Delete a preset of the user's own. Raises as :func:`saveAnatomy`."""
    known_anatomies.remove(name)


def _anatomies():
    try:
        return known_anatomies.anatomies()
    except InputError:  # the user's file is damaged, which the command line tells; the shipped ones are there
        return {name: known_anatomies.Anatomy(name, **entry) for name, entry in ANATOMIES.items()}


def linearKinds():
    """(name, title) of the methods that only align."""
    return [(name, _(entry["title"])) for name, entry in catalogue.known().items() if entry["linear"]]


def initials():
    return [
        ("affine", _("Rotate, shift and scale (affine)")),
        ("rigid", _("Rotate and shift (rigid)")),
        ("centre", _("Align the centers")),
        ("none", _("None: the scans are aligned")),
        ("transform", _("Start from a transform")),
    ]


def slidings():
    return [
        ("off", _("Nothing slides")),
        ("auto", _("What sliding masks show; without them, lungs of a CT")),
        ("lung", _("The lungs of a CT")),
    ]


def devices(known):
    """(value, text) pairs; ``known`` is what the worker found, empty before its first start."""
    pairs = [("auto", _("Automatic"))]
    for device in known or [{"name": "cpu"}]:
        title = device.get("title", _("CPU"))
        memory = _(", {gb:.0f} GB").format(gb=device["memory_gb"]) if "memory_gb" in device else ""
        pairs.append((device["name"], f"{title}{memory}"))
    return pairs
