"""What a batch says of its results: what stands out, and the page."""

import numpy as np
import pytest

from SymRegistrationLib.cohort.page import page
from SymRegistrationLib.cohort.summary import COLUMNS, PairState, csv_text, judge, ordered
from SymRegistrationLib.cohort.table import Row
from SymRegistrationLib.job import Job


def states(count=20):
    draw = np.random.default_rng(0)
    found = []
    for k in range(count):
        numbers = {
            "similarity_after": 0.8 + 0.01 * draw.standard_normal(),
            "ice_mean_mm": 0.05 + 0.004 * draw.standard_normal(),
            "folded_percent": 0.0,
            "confidence": 0.9,
            "verdict": "good",
        }
        found.append(
            PairState(
                Row(f"p{k}", k + 2, Job("f", f"m{k}", f"o/p{k}")), "done", numbers=numbers, seconds=1.0, attempts=1
            )
        )
    return found


def test_what_stands_out_and_what_does_not():
    found = states()
    judge(found)
    assert not any(state.stands_out for state in found), "ordinary spread accuses nobody"
    found[4].numbers["similarity_after"] = 0.5
    found[9].numbers["folded_percent"] = 0.3
    found[11].numbers["similarity_after"] = 0.99
    found[13].numbers["verdict"] = "bad"
    found[15].status, found[15].reason = "failed", "it\nbroke"
    judge(found)
    # (0.8 - 0.5) / (MAD about 0.01 * 0.67) * 0.67: far beyond 3.5; folded: 0.6745 * 0.3 / 0.002 = 101
    assert {k for k in range(20) if found[k].stands_out} == {4, 9, 13}
    assert (
        found[9].score == pytest.approx(0.6745 * 0.3 / 0.002)
        and "folded, % 0.3000 (usual 0.0000)" in found[9].stands_out
    )
    assert [state.row.identity for state in ordered(found)][:4] == ["p15", "p9", "p4", "p13"]
    assert csv_text(found).splitlines()[0] == ",".join(COLUMNS) and ",failed,it broke," in csv_text(found)


def test_few_pairs_say_nothing_about_the_usual():
    found = states(4)
    found[0].numbers["similarity_after"] = 0.1
    judge(found)
    assert not found[0].stands_out


def test_the_page_escapes_what_tables_say():
    state = PairState(Row("a&b", 2, Job("<script>.nii", "m.nii", "o")), "failed", "<img src=x onerror=alert(1)>")
    text = page([state], "<b>", 1.0)
    assert "<script>" not in text and "<img src=x" not in text and "a&amp;b" in text and "&lt;b&gt;" in text
