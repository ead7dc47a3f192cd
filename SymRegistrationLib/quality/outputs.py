"""The one table of what a registration delivers: writer, worker, report and Slicer panel read it. No torch.

A new map is one entry here and one field of :class:`~SymRegistrationLib.pipeline.Result` that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One thing that a registration delivers.

    Attributes:
        name: of its file (before the ending), of its node's role in Slicer, and in the worker's ``outputs``.
        kind: ``transform``, ``image`` (grey values of a scan) or ``map`` (numbers with a colour scale).
        grid: ``fixed`` or ``moving``: the scan on whose grid it lies, a transform starts there; ``maps``: the fixed
            scan's axes and field of view, no finer than the working grid.
        field: of :class:`~SymRegistrationLib.pipeline.Result`; what is None there is not delivered.
        title: short, for menus, legends and headings.
        meaning: one sentence for people.
        unit: of a map's numbers; "" for none.
        colours: of a map: ``diverging`` about 1 or ``sequential`` from 0.
        spare_bits: of a map: so many of the 23 bits of its numbers are left out of the file.
        usual: the Slicer panel makes it unless it is switched off; it shows ``title`` and ``meaning``.
    """

    name: str
    kind: str
    grid: str
    field: str
    title: str
    meaning: str
    unit: str = ""
    colours: str = ""
    spare_bits: int = 10
    usual: bool = True


OUTPUTS = (
    Output(
        "forward", "transform", "fixed", "forward", "Forward transform", "Brings the moving scan onto the fixed one."
    ),
    Output(
        "inverse", "transform", "moving", "inverse", "Inverse transform", "Brings the fixed scan onto the moving one."
    ),
    Output(
        "warped_moving", "image", "fixed", "warped_moving", "Warped moving scan", "The moving scan on the fixed grid."
    ),
    Output(
        "warped_fixed",
        "image",
        "moving",
        "warped_fixed",
        "Warped fixed scan",
        "The fixed scan on the moving grid.",
        usual=False,
    ),
    Output(
        "jacobian",
        "map",
        "maps",
        "jacobian",
        "Volume change",
        "Local volume change (Jacobian determinant) from fixed to moving: 1 = none, 0 or less = folding.",
        "volume factor",
        "diverging",
        13,
    ),
    Output(
        "inverse_consistency",
        "map",
        "maps",
        "ice_mm",
        "Inverse consistency error",
        "How far a point misses itself after going to the moving scan and back.",
        "mm",
        "sequential",
        16,
    ),
    Output(
        "uncertainty",
        "map",
        "fixed",
        "uncertainty",
        "Uncertainty",
        "How far off the result may be; what the map is worth is said where it is shown.",
        "mm",
        "sequential",
    ),
)


def names(kind: str = "") -> tuple[str, ...]:
    """Names of all outputs, or of one kind, in the order of the table."""
    return tuple(output.name for output in OUTPUTS if kind in ("", output.kind))


def of(name: str) -> Output:
    """The entry of a name. Raises KeyError when there is none."""
    return {output.name: output for output in OUTPUTS}[name]
