"""What a run is asked to do, and how it says no.

Standard library only, so that the Slicer module can build and check a job before torch exists.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checking import InputError as InputError
from .checking import RegistrationError as RegistrationError
from .checking import check_both_sides as check_both_sides
from .checking import check_seed as check_seed
from .checking import existing_file as existing_file
from .checking import numbers as numbers
from .checking import parsed_json as parsed_json
from .checking import usable_path as usable_path

#: Time and detail, fastest first; what they mean lies beside the optimisers, as data.
_PRESETS = json.loads((Path(__file__).parents[1] / "registration" / "presets.json").read_text(encoding="utf-8"))
EFFORTS: dict[str, str] = {name: entry["title"] for name, entry in _PRESETS["presets"].items()}
PRESETS = tuple(EFFORTS)
#: What is registered, by name: the options that suit it (beneath ``options``), a title and the reason; data, too.
ANATOMIES: dict[str, dict[str, Any]] = _PRESETS["anatomies"]
INITIALS = ("none", "centre", "rigid", "affine")
#: Where organs may slide along each other: nowhere; where masks or the lungs of a CT say so; at these lungs.
SLIDING = ("off", "auto", "lung")
SIMILARITIES = ("auto", "lncc", "mse", "ncc", "mind", "mi")
#: Fields of a job that name files to read.
INPUT_PATHS = tuple(
    f"{side}{part}" for part in ("", "_mask", "_labels", "_points", "_sliding_mask") for side in ("fixed", "moving")
)
#: ``tfm`` is text, and for linear methods only.
FORMATS = ("h5", "nrrd", "nii.gz", "tfm")
MOST_THREADS = 1024
#: Contrasts a side, the first one included.
MOST_CONTRASTS = 9

#: ``progress(stage, fraction, message)``: the only call-back of the pipeline; ``fraction`` is of the whole run, 0 to 1.
Progress = Callable[[str, float, str], None]


def silent(stage: str, fraction: float, message: str) -> None:
    """A progress call-back that says nothing."""


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What can be known of a method without running it; optimisers and networks add their own facts.

    Attributes:
        name: as typed after ``--method``.
        label: a short name for menus.
        title: one line for people.
        description: one or two sentences for people who choose.
        publication: authors, title, venue, DOI or arXiv.
        deviations: what differs from the publication, one sentence each.
        licence: of this implementation.
        inverse_method: how the second direction comes to be: ``svf``, ``dinet``, ``fixed_point`` or ``symmetric``.
    """

    name: str
    label: str
    title: str
    description: str
    publication: str
    deviations: tuple[str, ...]
    licence: str = "Apache-2.0"
    inverse_method: str


@dataclass(frozen=True)
class Options:
    """How to register; independent of the two scans.

    Attributes:
        method: a name from ``symreg methods``; ``syn`` needs no weights.
        preset: how much time the optimiser may take, one of :data:`PRESETS`.
        similarity: what the optimiser maximises; ``auto`` looks at the aligned pair and takes ``lncc`` for one
            contrast, ``mind`` for two.
        initial: ``none``, ``centre``, ``rigid``, ``affine``, or the path of a transform file (ITK: fixed -> moving).
        refine: optimiser levels run after a network, starting from its result; 0 = none.
        adapt: instance-optimisation steps of a network's own half-way fields on this very pair; 0 = none, ``None`` =
            two where the network can.
        spacing: working voxel size in mm; ``None`` lets the method decide.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of everything random.
        threads: CPU threads; ``None`` = all that torch finds.
        weights: a ``.safetensors`` file for the method; ``None`` = the shipped ones.
        uncertainty: number of perturbed runs behind the uncertainty map, ``"fast"`` = from the one run alone, 0
            = no map.
        memory_gb: stay below this much working memory; ``None`` = what is free.
        method_options: switches of the method itself, checked by it.
        ensemble: names of further methods, separated by commas; each runs once, and where they differ is uncertain.
        average: deliver the mean of all runs, taken in the log domain, instead of the method's own result.
        maps: further maps: spread and largest axis of the runs, contrast and Jacobian from coarse to fine.
        landmark_weight: 0 = landmarks only judge; up to 1 = the share of what is left that they pull away at each step.
        landmark_tolerance: mm within which a driving pair counts as met; a number, or one for each pair,
            separated by commas.
        drive_labels: labels that pull: ``all``, or numbers separated by commas; "" = labels only judge.
        label_weight: 0 to 1, how much of a step labels decide where they speak, against the images.
        stiffness: factor on the smoothing of the whole field; above 1 it bends less.
        contrast_weights: with further contrasts, how much each counts, the first pair of scans first: numbers separated
            by commas; "" = all the same.
        sliding: what may slide along its surroundings: nothing, or the regions of the sliding masks; without these, the
            lungs of two CT scans, which must be there (``lung``) or may be (``auto``). Unless it is ``off``, the
            initial alignment is that of the body's wall, which stays.
    """

    method: str = "syn"
    preset: str = "default"
    similarity: str = "auto"
    initial: str = "affine"
    refine: int = 0
    adapt: int | None = None
    spacing: float | None = None
    device: str = "auto"
    seed: int = 0
    threads: int | None = None
    weights: str | None = None
    uncertainty: int | str = 0
    memory_gb: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    ensemble: str = ""
    average: bool = False
    maps: bool = False
    landmark_weight: float = 0.0
    landmark_tolerance: float | str = 2.0
    drive_labels: str = ""
    label_weight: float = 0.8
    stiffness: float = 1.0
    contrast_weights: str = ""
    sliding: str = "off"

    def __post_init__(self) -> None:
        self._check_steering()
        _choice("preset", self.preset, PRESETS)
        _choice("similarity", self.similarity, SIMILARITIES)
        _choice("sliding", self.sliding, SLIDING)
        if not 0 <= self.refine <= 100:
            raise InputError(f"refine is {self.refine}.", "Give the number of optimiser levels, 0 for none.")
        if self.adapt is not None and not 0 <= self.adapt <= 1000:
            raise InputError(f"adapt is {self.adapt}.", "Give a number of steps from 0 (none) to 1000.")
        runs = self.uncertainty
        if runs != "fast" and (isinstance(runs, str) or not 0 <= runs <= 1000 or runs == 1):
            raise InputError(
                f"uncertainty is {runs}.",
                "A spread needs at least 2 runs and at most 1000; 0 turns the map off; "
                "'fast' makes it from the one run alone.",
            )
        if self.method in self.others:
            raise InputError(f"the ensemble names {self.method}, which is the method itself.", "Name other methods.")
        if self.average and not self.extra_runs:
            raise InputError(
                "average has nothing to average.", "Add --uncertainty N with N of at least 2, or --ensemble."
            )
        if self.spacing is not None and not 0 < self.spacing < math.inf:
            raise InputError(f"spacing is {self.spacing} mm.", "Give a positive voxel size.")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise InputError(f"threads is {self.threads}.", f"Give at least 1 and at most {MOST_THREADS}.")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InputError(f"memory_gb is {self.memory_gb}.", "Give a positive number of gigabytes.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise InputError(f"device '{self.device}' is unknown.", "Choose auto, cpu, cuda or cuda:N.")
        check_seed(self.seed)

    def _check_steering(self) -> None:
        for name in ("landmark_weight", "label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}.", "Give a number from 0 to 1.")
        if not 0.2 <= self.stiffness <= 10:
            raise InputError(f"stiffness is {self.stiffness}.", "Give a factor from 0.2 to 10; 1 is as usual.")
        if not all(0 < value < 1000 for value in numbers(self.landmark_tolerance, "landmark_tolerance")):
            raise InputError(f"landmark_tolerance is {self.landmark_tolerance}.", "Give mm above 0 and below 1000.")

    @property
    def others(self) -> tuple[str, ...]:
        """The further methods of the ensemble."""
        return tuple(name.strip() for name in self.ensemble.split(",") if name.strip())

    @property
    def extra_runs(self) -> int:
        """Registrations beside the first."""
        return len(self.others) + (0 if isinstance(self.uncertainty, str) else self.uncertainty)


@dataclass(frozen=True)
class Job:
    """One registration from files to files: what the command line, a batch row and the Slicer module all send.

    Paths are strings. ``output`` is a folder. See :class:`Options` for ``options``. What steers a run:

    * ``start_from``: folder of a finished registration of these two scans (or the state file in it) to go on from.
    * ``region``: mask on the fixed scan: only there the registration runs again; ``sphere``: the same as
      ``"x,y,z,radius"``, LPS mm of the fixed scan. Both need ``start_from``.
    * ``rim_mm``: so far around the region the change fades out; beyond it nothing changes.
    * ``keep_state``: also write what a later run needs to go on from this one, and the history of the folder.

    ``fixed_contrasts`` and ``moving_contrasts`` are further contrasts of the two sides, pair by pair (T1 with T1, T2
    with T2): scans that lie in physical space as the first one of their side does, on any grid. All of them drive one
    transform.
    """

    fixed: str
    moving: str
    output: str
    fixed_mask: str | None = None
    moving_mask: str | None = None
    fixed_labels: str | None = None
    moving_labels: str | None = None
    fixed_points: str | None = None
    moving_points: str | None = None
    fixed_sliding_mask: str | None = None
    moving_sliding_mask: str | None = None
    fixed_contrasts: list[str] = field(default_factory=list)
    moving_contrasts: list[str] = field(default_factory=list)
    transform_format: str = "h5"
    composite: bool = False
    dense: bool = False
    report: bool = True
    guide_with_points: bool = False
    start_from: str | None = None
    region: str | None = None
    sphere: str | None = None
    rim_mm: float = 10.0
    keep_state: bool = False
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        _choice("transform_format", self.transform_format, FORMATS)
        self._check_region()
        self._check_contrasts()
        for name in ("output", "start_from", "region"):
            if getattr(self, name) is not None:
                usable_path(getattr(self, name), name.replace("_", " "))
        for name, path in self.inputs.items():
            usable_path(path, name.replace("_", " "))
        check_both_sides(self)
        if self.fixed_sliding_mask and self.options.sliding == "off":
            raise InputError("sliding masks are given, but nothing shall slide.", "Add --sliding auto.")
        if self.guide_with_points and not self.fixed_points:
            raise InputError("guide_with_points needs landmarks.", "Add --fixed-points and --moving-points.")
        if self.composite and self.transform_format != "h5":
            raise InputError("a composite transform can only be stored as .h5.", "Use --transform-format h5.")

    def _check_region(self) -> None:
        if self.region and self.sphere:
            raise InputError("a region and a sphere are given.", "Give one of them.")
        if (self.region or self.sphere) and not self.start_from:
            raise InputError("only a finished registration can be repaired.", "Name its folder with --start-from.")
        if not 0.5 <= self.rim_mm <= 1000:
            raise InputError(f"rim_mm is {self.rim_mm}.", "Give a width in mm, at least 0.5.")
        if self.sphere and (len(values := numbers(self.sphere, "sphere")) != 4 or values[3] < 0):
            raise InputError(f"sphere is '{self.sphere}'.", "Give x,y,z of its centre (LPS mm) and its radius in mm.")

    def _check_contrasts(self) -> None:
        for side in ("fixed", "moving"):
            object.__setattr__(self, f"{side}_contrasts", list(getattr(self, f"{side}_contrasts")))
        count = len(self.fixed_contrasts), len(self.moving_contrasts)
        if count[0] != count[1]:
            raise InputError(
                f"{count[0]} further contrasts of the fixed side and {count[1]} of the moving side are given.",
                "Give as many --fixed-contrast as --moving-contrast, pair by pair.",
            )
        if count[0] > MOST_CONTRASTS - 1:
            raise InputError(f"{count[0]} further contrasts are given.", f"At most {MOST_CONTRASTS - 1} are taken.")

    @property
    def inputs(self) -> dict[str, str]:
        """Path of every scan, mask, label map and landmark file, by its part in the run: the names of INPUT_PATHS, and
        ``fixed_2``, ``moving_2`` and so on for further contrasts."""
        found = {name: getattr(self, name) for name in INPUT_PATHS if getattr(self, name) is not None}
        for side in ("fixed", "moving"):
            found |= {f"{side}_{k}": path for k, path in enumerate(getattr(self, f"{side}_contrasts"), 2)}
        return found

    @property
    def step(self) -> str:
        """What the job does to a result: ``register``, ``update`` or ``repair``."""
        return "repair" if self.region or self.sphere else "update" if self.start_from else "register"

    def to_json(self) -> str:
        """The job as one JSON text; :meth:`from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: not JSON, not an object, an unknown or missing field, or a value that is not allowed.
        """
        return cls.from_dict(parsed_json(text, "the job"))

    @classmethod
    def from_dict(cls, raw: Any) -> Job:
        """Build a job from plain data, checking names and types. Raises InputError."""
        data = check_fields(cls, raw, "job")
        data["options"] = Options(**check_fields(Options, _renamed(data.get("options", {})), "options"))
        return cls(**data)


#: Earlier names of options, which jobs written then still hold.
FORMER_NAMES = {"metric": "similarity"}


def _renamed(options: Any) -> Any:
    """Options with :data:`FORMER_NAMES` replaced. Raises InputError when one is given under both names."""
    if not isinstance(options, dict):
        return options
    for former, name in FORMER_NAMES.items():
        if former in options and name in options:
            raise InputError(f"the options give '{name}' twice, also as '{former}'.", f"Leave '{former}' out.")
    return {FORMER_NAMES.get(name, name): value for name, value in options.items()}


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is '{value}'.", f"Choose one of: {', '.join(allowed)}.")


_TYPES = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
    "Options": (dict,),
    "list[str]": (list, tuple),
}


def check_fields(cls: type, raw: Any, what: str) -> dict[str, Any]:
    """``raw`` as keyword arguments of the dataclass ``cls``, every name and type checked. Raises InputError."""
    if not isinstance(raw, dict):
        raise InputError(
            f"the {what} must be a JSON object, not {type(raw).__name__}.", 'Write it as {"name": value, ...}.'
        )
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in raw:
        if name not in known:
            raise InputError(f"unknown field '{name}' in the {what}.", f"Known: {', '.join(known)}.")
    for name, f in known.items():
        if name not in raw:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise InputError(f"the {what} has no '{name}'.", "Add it.")
            continue
        kinds = [kind.strip() for kind in str(f.type).split("|")]
        value = raw[name]
        if value is None and "None" in kinds:
            continue
        kinds = [kind for kind in kinds if kind != "None"]
        expected = tuple(one for kind in kinds for one in _TYPES[kind])
        texts = "list[str]" not in kinds or (
            isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
        )
        if not texts or not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise InputError(f"'{name}' in the {what} must be {words}, not {value!r:.200}.", "Correct its value.")
    return dict(raw)


_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict[str, Any]": "an object",
    "Options": "an object",
    "list[str]": "a list of texts",
}
