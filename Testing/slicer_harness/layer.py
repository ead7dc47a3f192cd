"""Which Python layer the Slicer tests run on. Knows nothing of Slicer or Qt, so that pytest and CI can ask first.

    python Testing/slicer_harness/layer.py

SLICER_PYTHON decides: a folder with Slicer's own Python files (``bin/Python`` of an installed Slicer, or a release
below ``../shared/slicer/genuine``), or the word ``imitation``. Without it, the genuine files of release 5.10.0 are
taken when they lie beside the project, and else the harness's imitation.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BESIDE = REPOSITORY.parent / "shared" / "slicer" / "genuine" / "5.10.0"
IMITATION = "imitation"


def folder() -> Path | None:
    """Folder of the genuine files, or None for the imitation.

    Raises:
        FileNotFoundError: SLICER_PYTHON names a folder without them.
    """
    named = os.environ.get("SLICER_PYTHON", "")
    if named == IMITATION or (not named and not _has_layer(BESIDE)):
        return None
    found = (Path(named) if named else BESIDE).resolve()
    if not _has_layer(found):
        raise FileNotFoundError(
            f"SLICER_PYTHON is '{named}', but there is no slicer/parameterNodeWrapper in it. "
            "Name the folder bin/Python of an installed Slicer, or say 'imitation'."
        )
    return found


def release() -> str:
    """Version that the application tells: of the genuine files where their folder's name says it, else 5.10.0."""
    found = folder()
    return found.name if found is not None and found.name[:1].isdigit() else "5.10.0"


def described() -> str:
    """One line for reports."""
    found = folder()
    return (
        f"Slicer's Python layer: genuine, {found}"
        if found is not None
        else "Slicer's Python layer: imitated by the test harness"
    )


def _has_layer(path: Path) -> bool:
    return (path / "slicer" / "parameterNodeWrapper").is_dir()


if __name__ == "__main__":
    print(described())
