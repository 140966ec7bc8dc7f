"""What is told of a search: which trials are on the front, which is the result, in every format and at any time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from tests.tune.pages import BUDGETS, NASTY, write_study
from tests.tune.toys import tune

from kvthrift import RunError
from kvthrift.tune.report import FORMATS, html, read_study


def test_the_front_the_best_and_what_failed(tmp_path: Path) -> None:
    found = read_study(write_study(tmp_path / "study"))
    assert [point.trial for point in found.points if point.front] == [1, 3]
    assert [point.trial for point in found.points if point.best] == [3]
    assert [point.quality for point in found.points] == [0.5, 0.4, None, 0.75, 0.7, None]
    assert found.points[2].error.startswith("no room")
    assert found.points[5].error == "the agreement is not a number"
    assert found.points[0].share == 0.25
    assert found.budgets == BUDGETS


def test_a_search_under_way_has_what_there_is(tmp_path: Path) -> None:
    found = read_study(write_study(tmp_path / "study", 2))
    assert len(found.points) == 2
    assert not any(point.best for point in found.points)
    assert found.budgets == ()


def test_a_real_search_is_told_as_it_was(tmp_path: Path) -> None:
    search, best = tune(tmp_path / "study", trials=9)
    (tmp_path / "study" / "study.toml").write_text(
        (write_study(tmp_path / "other") / "study.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    found = read_study(tmp_path / "study")
    assert [point.trial for point in found.points if point.best] == [best.number]
    assert {point.trial for point in found.points if point.front} == {trial.number for trial in search.front()}


def test_formats_have_the_same_numbers(tmp_path: Path) -> None:
    found = [read_study(write_study(tmp_path / "study"))]
    assert "| 3 | 75.0% | 4,000 | 25.0% | 1.5 | best, front |" in FORMATS["md"](found)
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](found))))
    assert [line["quality"] for line in lines] == ["0.5", "0.4", "", "0.75", "0.7", ""]
    assert json.loads(FORMATS["json"](found))[0]["points"][3]["best"] is True


def test_a_page_looks_again_only_while_the_search_goes_on(tmp_path: Path) -> None:
    found = [read_study(write_study(tmp_path / "study"))]
    assert 'http-equiv="refresh"' in html(found, live=True)
    assert 'http-equiv="refresh"' not in html(found)
    assert NASTY not in html(found)


@pytest.mark.parametrize("damage", ["no trials", "no study", "no toml"])
def test_what_is_no_search_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_study(tmp_path / "study")
    if damage == "no trials":
        (folder / "trials.jsonl").write_text("")
    elif damage == "no study":
        (folder / "study.toml").unlink()
    else:
        (folder / "study.toml").write_text("= 3")
    with pytest.raises(RunError, match=r"trials yet|cannot be read"):
        read_study(folder)
