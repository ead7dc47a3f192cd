"""Landmarks on disk and in memory: CSV, Slicer's ``.fcsv`` and ``.mrk.json``; always LPS mm inside.

Files say which world they are in (RAS or LPS); the sign change happens here and nowhere else.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..job import InputError, existing_file

FORMATS_HINT = "Readable are CSV with columns x,y,z (LPS mm) or r,a,s, Slicer's .fcsv, and Slicer's .mrk.json."
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_COORDINATE = re.compile(r"(?:position|pos|coord)?[_ ]?([xyz])(?:[_ ]?\(?(lps|ras)\)?)?(?:[_ ]?\(?mm\)?)?")
_LABEL_COLUMNS = ("label", "name", "region", "id")


@dataclass(frozen=True, eq=False)
class PointSet:
    """Landmarks of one scan.

    Attributes:
        points: (n, 3) float64, LPS mm, read-only.
        labels: n names, empty text where the file gives none.
        source: the file or node, for messages.
        radii: n radii in mm within which 68 % of such points lie, nan where not known; empty = none known.
    """

    points: np.ndarray
    labels: tuple[str, ...]
    source: str = "points"
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        points = np.array(self.points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3 or len(points) != len(self.labels):
            raise ValueError(f"{self.source}: points {points.shape} and {len(self.labels)} labels do not fit")
        points.setflags(write=False)
        object.__setattr__(self, "points", points)

    def __len__(self) -> int:
        return len(self.points)

    def moved(self, points: np.ndarray) -> PointSet:
        """The same landmarks elsewhere; (n, 3) LPS mm."""
        return PointSet(points, self.labels, self.source)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """What is known of each point, in words; empty text where nothing is."""
        return tuple("" if r != r else f"68 %: within {r:.2f} mm" for r in self.radii or [float("nan")] * len(self))


def read_points(path: str | Path, what: str = "landmarks") -> PointSet:
    """Read landmarks; the content decides the format, not the file name.

    A CSV without a word about its coordinate system is taken as LPS mm (DICOM, ITK); ``r,a,s`` columns are RAS.

    Args:
        path: of the file.
        what: its part in the run, for messages ("fixed landmarks").

    Raises:
        InputError: missing, unreadable, no coordinate columns, no points, or a coordinate that is not a finite number.
    """
    path = existing_file(path, what)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} '{path}' could not be read as text ({error}).", FORMATS_HINT) from None
    if text.lstrip().startswith("{"):
        points, labels = _parse_json(text, f"{what} '{path}'")
    else:
        points, labels = _parse_csv(text, f"{what} '{path}'")
    if not points:
        raise InputError(f"{what} '{path}' holds no points.", FORMATS_HINT)
    array = np.array(points, dtype=np.float64)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise InputError(
            f"{what} '{path}' has a coordinate that is not finite at point {int(np.argmax(bad)) + 1}.",
            "Remove or correct it.",
        )
    return PointSet(array, tuple(labels), str(path))


def write_points(path: str | Path, points: PointSet) -> None:
    """Write landmarks so that Slicer loads them; ``.csv``, ``.fcsv`` or ``.mrk.json`` (``.json``), all LPS mm.

    Raises:
        InputError: another file name ending.
    """
    name = str(path).lower()
    if name.endswith(".json"):
        text = _to_json(points)
    elif name.endswith(".fcsv"):
        text = _to_fcsv(points)
    elif name.endswith(".csv"):
        text = _to_csv(points)
    else:
        raise InputError(f"points cannot be written as '{path}'.", "Use a name that ends in .csv, .fcsv or .mrk.json.")
    Path(path).write_text(text, encoding="utf-8")


def paired(fixed: PointSet, moving: PointSet) -> tuple[PointSet, PointSet]:
    """Two landmark lists in corresponding order.

    Lists with the same unique names are matched by name; otherwise row i belongs to row i, which is refused when the
    names are shared in part and contradict it.

    Raises:
        InputError: other counts, or names that contradict the order.
    """
    if len(fixed) != len(moving):
        raise InputError(
            f"'{fixed.source}' has {len(fixed)} landmarks and '{moving.source}' has {len(moving)}.",
            "Both need the same landmarks in the same order.",
        )
    if fixed.labels == moving.labels:
        return fixed, moving
    unique = len(set(fixed.labels)) == len(fixed) == len(set(moving.labels))
    if unique and set(fixed.labels) == set(moving.labels):
        order = [moving.labels.index(label) for label in fixed.labels]
        return fixed, PointSet(moving.points[order], fixed.labels, moving.source)
    shared = Counter(fixed.labels) & Counter(moving.labels)
    shared.pop("", None)
    if shared:
        row = next(i for i, (a, b) in enumerate(zip(fixed.labels, moving.labels)) if a != b)
        raise InputError(
            f"landmark {row + 1} is '{fixed.labels[row]}' in '{fixed.source}' but '{moving.labels[row]}' in "
            f"'{moving.source}'.",
            "Give both lists the same names, or the same order without names.",
        )
    return fixed, moving


# ---------------------------------------------------------------------------------------------- Slicer's JSON


def _parse_json(text: str, what: str) -> tuple[list, list[str]]:
    try:
        markups = json.loads(text)["markups"]
        points, labels = [], []
        for markup in markups:
            units = markup.get("coordinateUnits", "mm")
            if "mm" not in str(units):
                raise InputError(f"{what} is in {units}, not in mm.", "Convert it to mm.")
            sign = _signs(markup.get("coordinateSystem", "LPS"), what)
            for point in markup.get("controlPoints", []):
                if point.get("positionStatus", "defined") != "defined":
                    continue
                position = [float(value) for value in point["position"]]
                if len(position) != 3:
                    raise ValueError(f"a position of {len(position)} numbers")
                points.append(np.array(position) * sign)
                labels.append(str(point.get("label", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{what} is not a Slicer markups file ({reason[:120]}).", FORMATS_HINT) from None
    return points, labels


def _to_json(points: PointSet) -> str:
    controls = [
        {
            "id": str(i + 1),
            "label": label,
            "description": description,
            "associatedNodeID": "",
            "position": [float(v) for v in point],
            "orientation": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
            "selected": True,
            "locked": False,
            "visibility": True,
            "positionStatus": "defined",
        }
        for i, (point, label, description) in enumerate(zip(points.points, points.labels, points.descriptions))
    ]
    schema = (
        "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
        "markups-schema-v1.0.3.json#"
    )
    markup = {
        "type": "Fiducial",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": len(controls),
        "controlPoints": controls,
        "measurements": [],
    }
    return json.dumps({"@schema": schema, "markups": [markup]}, indent=1)


def _signs(system: object, what: str) -> np.ndarray:
    """Factors that turn a file's coordinates into LPS; ``system`` as Slicer writes it, old files with numbers."""
    name = {"0": "RAS", "1": "LPS", "2": "IJK"}.get(str(system).strip(), str(system).strip().upper())
    if name not in ("LPS", "RAS"):
        raise InputError(f"{what} is in the coordinate system '{name}'.", "Save it in LPS or RAS.")
    return _RAS_TO_LPS if name == "RAS" else np.ones(3)


# ---------------------------------------------------------------------------------------------- CSV and fcsv


def _parse_csv(text: str, what: str) -> tuple[list, list[str]]:
    comments = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    try:
        rows = _rows(text)
    except csv.Error as error:
        raise InputError(f"{what} is not a table of landmarks ({error}).", FORMATS_HINT) from None
    header, sign = None, np.ones(3)
    if any("fiducial file" in line.lower() for line in comments):
        # fcsv files older than the CoordinateSystem line are RAS.
        declared = [line.split("=", 1)[1] for line in comments if line.lower().startswith("coordinatesystem")]
        sign = _signs(declared[0] if declared else "RAS", what)
        columns = [line.split("=", 1)[1] for line in comments if line.lower().startswith("columns")]
        names = columns[0] if columns else "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
        header = [name.strip().lower() for name in names.split(",")]
    elif rows and not any(_is_number(cell) for cell in rows[0]):
        header = [name.strip().lower() for name in rows.pop(0)]
    if header is None:
        where, label = _guess_columns(rows, what)
    else:
        where, label, header_sign = _named_columns(header, what)
        sign = sign * header_sign
    points, labels = [], []
    for number, row in enumerate(rows, start=1):
        if not _is_placed(row, header or []):
            continue
        try:
            points.append(np.array([float(row[k]) for k in where]) * sign)
        except (ValueError, IndexError):
            raise InputError(
                f"{what}: point {number} has no three numbers ({', '.join(row)[:60]}).", FORMATS_HINT
            ) from None
        labels.append(row[label].strip() if label is not None and label < len(row) else "")
    return points, labels


def _is_placed(row: list[str], header: list[str]) -> bool:
    """False for a point that Slicer lists without a place: ``defined`` is 0, or the status behind an fcsv file's
    columns is not 2."""
    if "defined" in header:
        return "".join(row[header.index("defined") :][:1]).strip() not in ("0", "0.0", "false")
    if "associatednodeid" in header and header.index("associatednodeid") == len(header) - 1 and len(row) > len(header):
        return row[len(header)].strip() in ("", "2")
    return True


def _rows(text: str) -> list[list[str]]:
    """The filled rows that are no comments, split at the separator that the first of them uses most."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return []
    separator = max(",;\t", key=lines[0].count)
    if lines[0].count(separator) == 0:
        return [line.split() for line in lines]
    return [
        row for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=separator) if any(c.strip() for c in row)
    ]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _named_columns(header: list[str], what: str) -> tuple[list[int], int | None, np.ndarray]:
    """Where the coordinates and the label are, and the factors to LPS that the names tell."""
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    for names, sign in ((("l", "p", "s"), np.ones(3)), (("r", "a", "s"), _RAS_TO_LPS)):
        if all(name in header for name in names):
            return [header.index(name) for name in names], label, sign
    found = {match[1]: (k, match[2]) for k, name in enumerate(header) if (match := _COORDINATE.fullmatch(name))}
    if set(found) == {"x", "y", "z"} and len({system for _, system in found.values()}) == 1:
        system = found["x"][1] or "lps"
        return [found[axis][0] for axis in "xyz"], label, _RAS_TO_LPS if system == "ras" else np.ones(3)
    raise InputError(f"{what} has no coordinate columns (found: {', '.join(header)[:80]}).", FORMATS_HINT)


def _guess_columns(rows: list[list[str]], what: str) -> tuple[list[int], int | None]:
    """For files without a header: three numbers a row, with one text column more at most."""
    numeric = [k for k, cell in enumerate(rows[0]) if _is_number(cell)] if rows else [0, 1, 2]
    if len(numeric) != 3:
        raise InputError(f"{what} has no header and {len(numeric)} numbers in its first row.", FORMATS_HINT)
    others = [k for k in range(len(rows[0])) if k not in numeric and rows[0][k].strip()] if rows else []
    return numeric, others[0] if others else None


def _to_csv(points: PointSet) -> str:
    """Slicer's control points table, which other programs read as well."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    more = ["radius68_mm"] if points.radii else []
    writer.writerow(["label", "l", "p", "s", "defined", "selected", "visible", "locked", "description", *more])
    for k, ((x, y, z), label, text) in enumerate(zip(points.points, points.labels, points.descriptions)):
        radius = [f"{points.radii[k]:.3f}" if text else ""] if more else []
        writer.writerow([label, *(f"{v:.6f}" for v in (x, y, z)), 1, 1, 1, 0, text, *radius])
    return out.getvalue()


def _to_fcsv(points: PointSet) -> str:
    out = io.StringIO()
    out.write(
        "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    )
    writer = csv.writer(out, lineterminator="\n")
    for i, ((x, y, z), label, text) in enumerate(zip(points.points, points.labels, points.descriptions), start=1):
        writer.writerow([i, *(f"{v:.6f}" for v in (x, y, z)), 0, 0, 0, 1, 1, 1, 0, label, text, ""])
    return out.getvalue()
