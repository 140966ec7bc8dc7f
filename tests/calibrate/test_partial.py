"""Results survive a kill at any byte; what cannot be trusted is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvthrift import CalibrationError
from kvthrift.calibrate.partial import Partial

SETTINGS = {"model": "abc", "seed": 0}
RESULTS: list[dict[str, Any]] = [{"mass": [0.1, 1 / 3]}, {"mass": None}, {"mass": [2.5e-17]}]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    with Partial.open(tmp_path / "out", SETTINGS) as partial:
        for result in RESULTS:
            partial.add(result)
    return tmp_path / "out"


def beside(target: Path) -> Path:
    return Path(f"{target}.partial")


def test_results_are_there_again(target: Path) -> None:
    with Partial.open(target, SETTINGS) as partial:
        assert partial.results == RESULTS


def test_a_kill_at_any_byte_loses_the_last_result_at_most(target: Path) -> None:
    whole = beside(target).read_bytes()
    for length in range(len(whole) + 1):
        beside(target).write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        with Partial.open(target, SETTINGS) as partial:
            assert partial.results == RESULTS[: max(lines - 1, 0)]
            for result in RESULTS[len(partial.results) :]:
                partial.add(result)
        assert beside(target).read_bytes() == whole


def test_damage_before_the_end_is_refused_and_force_begins_anew(target: Path) -> None:
    whole = beside(target).read_bytes()
    for place in range(0, len(whole) - 1, 5):
        beside(target).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CalibrationError, match="is damaged"):
            Partial.open(target, SETTINGS)
    with Partial.open(target, SETTINGS, force=True) as partial:
        assert partial.results == []


def test_other_settings_are_refused_and_force_begins_anew(target: Path) -> None:
    before = beside(target).read_bytes()
    with pytest.raises(CalibrationError, match="other settings \\(seed 0 instead of 1\\)"):
        Partial.open(target, {"model": "abc", "seed": 1})
    assert beside(target).read_bytes() == before
    with Partial.open(target, {"model": "abc", "seed": 1}, force=True) as partial:
        assert partial.results == []
    with Partial.open(target, {"model": "abc", "seed": 1}) as partial:
        assert partial.results == []


def test_force_keeps_results_of_the_same_settings(target: Path) -> None:
    with Partial.open(target, SETTINGS, force=True) as partial:
        assert partial.results == RESULTS


def test_two_runs_at_once_are_refused(target: Path) -> None:
    with Partial.open(target, SETTINGS) as first:
        with pytest.raises(CalibrationError, match="another run is writing"):
            Partial.open(target, SETTINGS)
        first.add({"mass": []})
    with Partial.open(target, SETTINGS) as second:
        assert second.results == [*RESULTS, {"mass": []}]


def test_removing_leaves_nothing(target: Path) -> None:
    with Partial.open(target, SETTINGS) as partial:
        partial.remove()
    assert list(target.parent.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        Partial.open(tmp_path / "no" / "out", SETTINGS)
