"""Tables of pairs: one row, one registration."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..job import INITIALS, INPUT_PATHS, MOST_CONTRASTS, InputError, Job, existing_file

#: Of further contrasts.
CONTRAST_COLUMNS = tuple(f"{side}_{k}" for k in range(2, MOST_CONTRASTS + 1) for side in ("fixed", "moving"))
COLUMNS = (*INPUT_PATHS, *CONTRAST_COLUMNS, "initial", "method", "id")
#: Columns of a table of scans (as for training), when everything goes onto one fixed scan.
SCANS = {"image": "moving", "labels": "moving_labels", "mask": "moving_mask", "points": "moving_points"}
#: Longest id in bytes: file systems allow 255 for a name, and files inside need their own.
LONGEST_ID = 120
#: Names that the batch itself uses in its folder.
TAKEN = ("summary.csv", "index.html", "batch.json", "workers.log", "scans.csv")
#: Stands in a template job for a path that every row gives itself.
UNSET = "-"
_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img")


@dataclass(frozen=True)
class Row:
    """One pair of a table.

    Attributes:
        identity: its id, also the name of its folder.
        line: where it stands in the table, 1 = first line of the file.
        job: what to do; ``job.output`` is the pair's folder.
    """

    identity: str
    line: int
    job: Job


@dataclass(frozen=True)
class Cells:
    """A table as text: ``lines`` are (line number, cell per column name); ``base`` is what relative
    paths start from."""

    name: str
    base: Path
    lines: tuple[tuple[int, dict[str, str]], ...]


def read_cells(path: str | Path) -> Cells:
    """Read a CSV or TSV file; comma, semicolon or tab, UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        InputError: missing, not text, empty, or with rows that do not fit the first line; names the table and the line.
    """
    path = existing_file(path, "table")
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = "\t" if "\t" in first else ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    lines = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not names:
                names = _names(path, cells)
                continue
            if len(cells) > len(names) and any(cells[len(names) :]):
                raise _wrong(
                    path,
                    reader.line_num,
                    f"it has {len(cells)} cells, the first line names {len(names)} columns",
                    "Put quotes around a cell that holds the separator.",
                )
            lines.append((reader.line_num, dict(zip(names, cells + [""] * (len(names) - len(cells))))))
    except csv.Error as error:
        raise _wrong(path, reader.line_num, f"it is not CSV ({error})", "Save the table again as CSV or TSV.") from None
    if not names:
        raise InputError(f"table '{path}' is empty.", f"Its first line must name columns: {', '.join(COLUMNS)}.")
    if not lines:
        raise InputError(f"table '{path}' has no rows below its first line.", "Write one line per pair.")
    return Cells(str(path), path.parent, tuple(lines))


def rows_of(cells: Cells, output: str | Path, template: Job) -> list[Row]:
    """One checked row per line.

    Args:
        cells: from :func:`read_cells`; relative paths start at its base.
        output: folder of the batch; the pair ``id`` gets ``output/id``.
        template: what holds for every row unless the row says otherwise. Its ``fixed`` and what belongs to it, unless
            ``UNSET``, fill the rows of a table without a column ``fixed``; its ``moving`` is ``UNSET``.

    Raises:
        InputError: unknown or missing columns, an empty cell that is needed, an id that is taken or cannot be a
            folder's name, labels of one scan only; names the table and the line.
    """
    names = list(cells.lines[0][1])
    one_fixed = template.fixed != UNSET
    aliases = SCANS if one_fixed and "moving" not in names else {}
    known = {*COLUMNS, *aliases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"table '{cells.name}' has an unknown column '{unknown[0]}'.", f"Known: {', '.join(sorted(known))}."
        )
    needed = [
        name
        for name in ("fixed", "moving")
        if name not in names and name not in (aliases.get(n) for n in names) and not (name == "fixed" and one_fixed)
    ]
    if needed:
        raise InputError(
            f"table '{cells.name}' has no column '{needed[0]}'.",
            f"Its first line must name at least fixed and moving; known: {', '.join(sorted(known))}.",
        )
    found = [(line, {aliases.get(name, name): text for name, text in values.items()}) for line, values in cells.lines]
    identities = _identities(cells.name, found, one_fixed and "fixed" not in names)
    return [
        Row(identity, line, _job(cells, line, values, replace(template, output=str(Path(output) / identity))))
        for identity, (line, values) in zip(identities, found)
    ]


def read_table(path: str | Path, output: str | Path, template: Job) -> list[Row]:
    """:func:`read_cells`, then :func:`rows_of`. Raises InputError."""
    return rows_of(read_cells(path), output, template)


def write_cells(path: str | Path, columns: list[str], lines: list[dict[str, str]]) -> None:
    """Write a table that :func:`read_cells` understands."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    Path(path).write_text(text.getvalue(), encoding="utf-8")


def check_identity(text: str) -> str | None:
    """Why ``text`` cannot be an id, or None when it can: it must be one plain folder name on every system."""
    if len(text.encode()) > LONGEST_ID:
        return f"is longer than {LONGEST_ID} bytes"
    if text.startswith("."):
        return "starts with a dot"
    if bad := re.search(r'[/\\:*?"<>|]', text):
        return f"holds '{bad.group()}', which a folder's name cannot hold everywhere"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Cf", "Zl", "Zp") for letter in text):
        return "holds an invisible character"
    if text.endswith((".", " ")) or text.split(".")[0].lower() in _WINDOWS or text.lower() in TAKEN:
        return "is a name that is reserved"
    return None


def stem(path: str) -> str:
    """The file's name without the ending of an image format."""
    name = Path(path.replace("\\", "/")).name
    return next((name[: -len(end)] for end in _ENDINGS if name.lower().endswith(end) and len(name) > len(end)), name)


# ---------------------------------------------------------------------------------------------- inside


def _wrong(table: object, line: int, message: str, hint: str = "") -> InputError:
    return InputError(f"table '{table}', line {line}: {message.rstrip('.')}.", hint)


def _text(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"table '{path}' is a folder.", "Give a CSV or TSV file.")
    try:
        raw = path.read_bytes()
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"table '{path}' could not be read as UTF-8 text ({str(error)[:120]}).",
            "Save it as 'CSV UTF-8' or as tab-separated text.",
        ) from None
    if "\0" in text:
        raise InputError(f"table '{path}' is not text.", "Save it as CSV; spreadsheets (.xlsx) are not read.")
    return text


def _names(path: Path, cells: list[str]) -> list[str]:
    while cells and not cells[-1]:
        cells = cells[:-1]
    names = [cell.lower() for cell in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"table '{path}' names the column '{twice[0]}' twice.", "Every column needs a name of its own."
        )
    return names


def _identities(table: str, found: list[tuple[int, dict[str, str]]], short: bool) -> list[str]:
    """The id of every row, given or made of the scans' names; no two fall together on any file system."""
    given = [values.get("id", "") for _, values in found]
    made = [_made(values, short) for _, values in found]
    counts = Counter(_folded(name) for name in (a or b for a, b in zip(given, made)))
    identities: list[str] = []
    lines: dict[str, int] = {}
    for text, name, (line, values) in zip(given, made, found):
        if not text and counts[_folded(name)] > 1:
            files = "\n".join(values.get(column, "") for column in ("fixed", "moving"))
            name = f"{name}-{hashlib.sha256(files.encode()).hexdigest()[:8]}"
        identity = text or name
        problem = check_identity(identity)
        if problem:
            raise _wrong(
                table,
                line,
                f"the id '{identity}' {problem}",
                "An id names the pair's folder; use letters, digits, - and _.",
            )
        before = lines.setdefault(_folded(identity), line)
        if before != line:
            raise _wrong(
                table, line, f"the id '{identity}' is that of line {before} too", "Give every pair an id of its own."
            )
        identities.append(identity)
    return identities


def _made(values: dict[str, str], short: bool) -> str:
    fixed, moving = (stem(values.get(column, "")) for column in ("fixed", "moving"))
    name = moving if short else f"{moving}_to_{fixed}"
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".")
    return name.encode()[: LONGEST_ID - 20].decode(errors="ignore").strip(" .") or "pair"


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _job(cells: Cells, line: int, values: dict[str, str], template: Job) -> Job:
    changes: dict[str, Any] = {}
    for column in INPUT_PATHS:
        if values.get(column):
            changes[column] = str(cells.base / values[column])
        elif column in values and column in ("fixed", "moving"):
            raise _wrong(cells.name, line, f"'{column}' is empty", "Every row needs both scans.")
    given = [name for name in CONTRAST_COLUMNS if values.get(name)]
    for name in given:
        other = name.replace("fixed", "moving") if name.startswith("fixed") else name.replace("moving", "fixed")
        if other not in given:
            raise _wrong(cells.name, line, f"'{name}' is given without '{other}'", "Contrasts go pair by pair.")
    if given:
        for side in ("fixed", "moving"):
            changes[f"{side}_contrasts"] = [str(cells.base / values[name]) for name in given if name.startswith(side)]
    options: dict[str, Any] = {name: values[name] for name in ("initial", "method") if values.get(name)}
    if options.get("initial", "none") not in INITIALS:
        options["initial"] = str(cells.base / options["initial"])
    try:
        return replace(template, **changes, options=replace(template.options, **options))
    except InputError as error:
        raise _wrong(cells.name, line, error.message, error.hint) from None
