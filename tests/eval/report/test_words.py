"""The plain words on a run: what is named best, which cache is small enough, and every warning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.eval.report.pages import ARMS, GRID, SESSION, row

from kvthrift.eval.folder import Run
from kvthrift.eval.report.words import Words, in_short
from kvthrift.eval.table import tables

ZERO = {"full": (1, 1, 1, 1)}


def words(scores: dict[str, Sequence[float]], *, waiting: bool = False) -> Words:
    """Of a run of one task; arms that are not named score 0."""
    count = len(scores["full"])
    rows = [
        {**row(arm, "toy.word", sample, "visible"), "score": scores.get(arm.name, (0,) * count)[sample]}
        for sample in range(count)
        for arm in ARMS
    ]
    made = Run(Path("x"), replace(GRID, question="visible"), ARMS, (SESSION,), tuple(rows[:-1] if waiting else rows))
    return in_short(tables(made)[0])


def test_best_smallest_and_controls() -> None:
    found = words({"full": (1,) * 40, "snapkv@96": (1,) * 40, "snapkv@48": (1,) * 39 + (0,), "h2o@96": (0, 1) * 20})
    best, smallest, controls = found.said
    assert best.startswith("Best score: snapkv at a budget of 96, 100.0 [100.0, 100.0] of 100, holding 6")
    assert "The full cache scores 100.0" in best
    assert smallest.startswith(
        "Smallest cache within 5 points of the full one: snapkv at a budget of 48, 97.5, holding 3"
    )
    assert controls == (
        "Controls at the same budget of 96: random eviction 0.0, sinks and recent tokens only (streamingllm) 0.0."
    )
    assert found.warned == ("Not settled which method is best: the interval of snapkv@96 overlaps with snapkv@48.",)


def test_nothing_near() -> None:
    assert words(ZERO).said[1] == "No method came within 5 points of the full cache."


def test_warnings() -> None:
    few, settled, controls, above = words({**ZERO, "random@48": (1, 1, 1, 0), "random@96": (0, 0, 1, 0)}).warned
    assert few == "Few samples: 4 samples a task, so one answer moves a task's score by 25 points."
    assert settled.endswith("overlaps with snapkv@96, h2o@48 and h2o@96.")
    assert "not shown to beat the controls" in controls
    assert above == "No method did as well as the best control: random@48 and random@96 scored more than snapkv@48."


def test_a_full_cache_that_knows_nothing() -> None:
    assert any("little that compression could lose" in text for text in words({"full": (0,) * 4}).warned)


def test_one_sample_has_no_interval() -> None:
    assert words({"full": (1,)}).warned[0].startswith("Few samples: 1 sample a task")


def test_an_unfinished_run() -> None:
    assert words(ZERO, waiting=True).warned[-1].startswith("The run is not finished: 1 sample waits")
