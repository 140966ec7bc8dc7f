"""Agreement by position and needles by depth, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.eval.report.pages import ARMS, DEPTHS, GRID, SAMPLES, run, snapshot

from kvthrift.eval.report.curves import POSITIONS, agreement, needles
from kvthrift.eval.report.snapshots import plain
from kvthrift.eval.table import compared


def turn(steps: int, *mismatches: int) -> dict[str, Any]:
    return {"steps": steps, "mismatches": list(mismatches)}


def test_shares_are_of_answers_that_are_so_long() -> None:
    lines = [[{"agreement": [turn(4, 1)]}, {"agreement": [turn(2, 1), turn(3)]}], [{"agreement": None}, {}]]
    found = agreement({"t": lines})
    assert found == {
        "width": 1,
        "arms": {"all": [[1, pytest.approx(1 / 3, abs=1e-4), 1, 1], [None] * 4]},
        "answers": {"all": [3, 3, 2, 1]},
    }


def test_long_answers_have_several_tokens_a_column() -> None:
    found = agreement({"t": [[{"agreement": [turn(2 * POSITIONS + 1, 0, 2, 4)]}]]})
    assert found is not None
    assert found["width"] == 3
    assert found["arms"]["all"][0][:3] == [pytest.approx(1 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4), 1]


def test_tasks_are_kept_apart_and_together() -> None:
    found = agreement({"a": [[{"agreement": [turn(1, 0)]}]], "b": [[{"agreement": [turn(1)]}]]})
    assert found is not None
    assert found["arms"] == {"all": [[0.5]], "a": [[0]], "b": [[1]]}


def test_rows_without_agreement_have_none() -> None:
    assert agreement({"a": [[{"agreement": None}]]}) is None


def test_needles_are_means_by_depth(tmp_path: Path) -> None:
    made = run(tmp_path)
    found = needles(made, "visible", compared(made, "visible"))
    assert len(found) == len(ARMS) * len(GRID.tasks) * len(DEPTHS)
    full = [one for one in found if one["arm"] == "full"]
    assert {one["score"] for one in full} == {100}
    assert {one["samples"] for one in full} == {SAMPLES // len(DEPTHS)}
    assert {one["depth"] for one in full} == set(DEPTHS)


def test_rows_without_depth_have_no_needles(tmp_path: Path) -> None:
    assert needles(run(tmp_path), "visible", {"t": [[{"score": 1, "meta": {}}, {"score": 1}]] * len(ARMS)}) == []


def test_a_text_is_there_once_for_all_arms() -> None:
    found = plain([("a", [snapshot("snapkv@48"), snapshot("h2o@48")]), ("b", [snapshot("h2o@48")])])
    assert [text["run"] for text in found["texts"]] == ["a", "b"]
    assert [(arm["arm"], arm["text"]) for arm in found["arms"]] == [("snapkv@48", 0), ("h2o@48", 0), ("h2o@48", 1)]
