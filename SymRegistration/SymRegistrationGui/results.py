"""The numbers of a run as people read them: rows before and after, a verdict, and the table node."""

import vtk
from slicer.i18n import tr as _

#: Background of the verdict line per level; dark text is readable on all of them.
COLORS = {"good": "#bfe5bf", "look": "#ffe08a", "bad": "#ffb3a7"}


def number(value, digits=3):
    """A number for people, a dash for what is not known."""
    if value is None:
        return "\u2013"
    if isinstance(value, int):
        return str(value)
    if value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def columns():
    return [_("Measure"), _("Before"), _("Aligned"), _("After")]


def rows(metrics):
    """(measure, before, aligned, after) texts; numbers that exist only afterwards leave the middle empty."""
    found = []
    similarity = metrics.get("similarity") or {}
    if similarity:
        found.append((_("Similarity (0 to 1)"), *(number(similarity.get(k)) for k in ("before", "aligned", "after"))))
    labels = metrics.get("labels")
    names = ((metrics.get("job") or {}).get("names") or {}).get("labels") or {}
    if labels:
        found.append(
            (
                _("Overlap of labels, mean Dice"),
                *(number(labels.get(f"mean_{k}")) for k in ("before", "aligned", "after")),
            )
        )
        for name, values in labels["per_label"].items():
            found.append(
                (
                    "  " + names[name] if name in names else _("  label {name}").format(name=name),
                    *(number(values.get(k)) for k in ("before", "aligned", "after")),
                )
            )
    marks = metrics.get("landmarks")
    if marks:
        found.append(
            (
                _("Landmark error, mean of {count}, mm").format(count=marks["count"]),
                *(number(marks.get(f"mean_{k}_mm"), 2) for k in ("before", "aligned", "after")),
            )
        )
        found.append((_("Landmark error, 95 %, mm"), "", "", number(marks.get("p95_after_mm"), 2)))
    spread = metrics.get("uncertainty")
    if spread:
        name = (
            _("Radius that holds 68 % of errors, mean / 95 %, mm")
            if spread.get("calibrated")
            else _("Uncertainty (relative only), mean / 95 %, mm")
        )
        found.append((name, "", "", f"{number(spread['mean_mm'], 2)} / {number(spread['p95_mm'], 2)}"))
    return found + _qualityRows(metrics.get("quality") or {}) + _costRows(metrics)


def _qualityRows(quality):
    found = []
    if "folded_percent" in quality:
        found.append(
            (_("Folded voxels, %"), "", "", f"{number(quality['folded_percent'], 4)} ({quality['folded_voxels']})")
        )
    if "jacobian_min" in quality:
        found.append(
            (
                _("Volume factor, min / median / max"),
                "",
                "",
                " / ".join(number(quality.get(f"jacobian_{k}"), 2) for k in ("min", "median", "max")),
            )
        )
    if "ice_mean_mm" in quality:
        found.append(
            (
                _("Consistency, mean / 95 %, mm"),
                "",
                "",
                " / ".join(number(quality.get(f"ice_{k}_mm"), 3) for k in ("mean", "p95")),
            )
        )
    return found


def _costRows(metrics):
    seconds = (metrics.get("seconds") or {}).get("total")
    found = [] if seconds is None else [(_("Time, s"), "", "", number(float(seconds), 1))]
    memory = metrics.get("peak_memory_gb")
    return found + ([] if memory is None else [(_("Peak memory, GB"), "", "", number(float(memory), 1))])


def worthText(told):
    """What the uncertainty map is worth, in words; ``told`` is the part "uncertainty" of the metrics."""
    if not told.get("calibrated"):
        return _("Relative only: shows where the result is less stable, not by how many mm it errs.")
    return _("Calibrated: 68 % of true errors were below the shown mm on {on}.").format(on=told.get("on", ""))


def places(metrics):
    """(row, RAS) of folded places and of the least certain ones, to jump to."""
    found = []
    for text, regions in (
        (_("Folded place {k}: {voxels} voxels"), (metrics.get("folding") or {}).get("regions", [])),
        (
            _("Uncertain place {k}: {ml:.1f} ml, up to {worst:.1f} mm"),
            (metrics.get("uncertainty") or {}).get("worst", []),
        ),
    ):
        for k, region in enumerate(regions, start=1):
            x, y, z = region["centre"]
            found.append(((text.format(k=k, **region), "", "", _("show")), (-x, -y, z)))
    return found


def fillTable(table, metrics):
    """Write the rows into a vtkMRMLTableNode, where the Tables module can show and export them."""
    content = [columns(), *rows(metrics)]
    target = vtk.vtkTable()
    for column, title in enumerate(content[0]):
        array = vtk.vtkStringArray()
        array.SetName(title)
        for row in content[1:]:
            array.InsertNextValue(row[column])
        target.AddColumn(array)
    table.SetAndObserveTable(target)


def residuals(metrics):
    """(pair, what is left in mm, tolerance in mm, met) per landmark pair that pulled; empty when none did."""
    told = (metrics.get("steering") or {}).get("landmarks") or {}
    names = ((metrics.get("job") or {}).get("names") or {}).get("points") or []
    return [
        (names[k] if k < len(names) and names[k] else str(k + 1), left, allowed, left <= allowed)
        for k, (left, allowed) in enumerate(zip(told.get("residual_mm", []), told.get("tolerance_mm", [])))
    ]


def verdictText(metrics):
    """(rich text, background color) of what the numbers mean; empty texts when there is no verdict.

    The library decides. What is not registered is red and says so, whatever else is good.
    """
    verdict = metrics.get("verdict")
    if not verdict:
        return "", ""
    signs = {"good": "\u2713", "look": "\u26a0", "bad": "\u2717"}
    level, words = verdict["level"], verdict["words"]
    if verdict.get("registered") is False:
        level, words = "bad", _("NOT REGISTERED: the scans do not lie on each other.")
    if verdict.get("conclusion"):
        words = f"{verdict['conclusion']}: {words}"
    lines = [f"{signs[check['level']]} {check['text']}" for check in verdict["checks"] if check["level"] != "good"]
    head = f"<b>{signs[level]} {words}</b>"
    return "<br>".join([head, *lines]), COLORS[level]


def endText(metrics):
    """What the status line says of a result."""
    verdict = metrics.get("verdict") or {}
    if verdict.get("registered") is False:
        return _("NOT REGISTERED: see the reasons under Results.")
    return verdict.get("words", "")


def csvText(metrics):
    """The rows as CSV."""
    lines = [columns(), *rows(metrics)]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in lines)
