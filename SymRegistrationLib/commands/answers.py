"""What ``symreg worker`` answers with after a registration: raw files that are quick to write, and what the numbers
mean. No torch, so that the worker can announce itself before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..quality import outputs


def judged(metrics: Mapping[str, Any]) -> dict:
    """What the numbers mean, for clients that show it: level, words, every check with its level, and the conclusion of
    ``metrics.json``: PASS, WARN or FAIL, and whether the scans count as registered."""
    from ..quality.checks import checks, conclusion, verdict

    found = checks(metrics)
    level, words = verdict(found)
    told = conclusion(metrics)
    return {
        "level": level,
        "words": words,
        "checks": [{"level": check.level, "text": check.text} for check in found],
        "conclusion": told["level"],
        "registered": told["registered"],
    }


def write_raw(folder: Path, wanted: Sequence[str], result: Any) -> dict[str, str]:
    """Write the ``wanted`` parts of a :class:`~SymRegistrationLib.pipeline.Result` as uncompressed NRRD.

    Returns:
        File name per part; ``uncertainty`` is left out when the run made none. A transform is its lattice, with the
        affines before and after it as the keys ``before`` and ``after``.
    """
    import SimpleITK as sitk

    from ..geometry.file_checks import check_written
    from ..geometry.volumes import to_itk

    files = {}
    for output in outputs.OUTPUTS:
        delivered = getattr(result, output.field) if output.name in wanted else None
        if delivered is None:
            continue
        if output.kind == "transform":
            image = to_itk(delivered.displacement, delivered.grid, vector=True)
            for key in ("before", "after"):  # the affines around the lattice, (4, 4) LPS mm, row by row
                image.SetMetaData(key, " ".join(repr(float(v)) for v in getattr(delivered, key).ravel()))
        else:
            image = to_itk(delivered, result.grids[output.grid])
        files[output.name] = f"{output.name}.nrrd"
        sitk.WriteImage(image, str(folder / files[output.name]), useCompression=False)
        count = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
        check_written(folder / files[output.name], count)
    return files
