"""Samples answered together: the rows that each would have by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.eval.helped import fragile, ready
from tests.eval.toys import OtherToy, Toy, grid, run, runner

from kvthrift.errors import OptionError
from kvthrift.eval import batch
from kvthrift.eval.record import key_of
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample
from kvthrift.eval.workers import Crew


@dataclass(frozen=True)
class Uneven(Toy):
    """Contexts and questions of unequal lengths."""

    name = "toy.uneven"

    def samples(self, *args: Any, **kwargs: Any) -> Iterator[Sample]:
        for number, sample in enumerate(super().samples(*args, **kwargs)):
            turns = tuple(replace(turn, question=f" Where{'?' * number} {turn.question}") for turn in sample.turns)
            yield replace(sample, context=sample.context[7 * number :], turns=turns)


def answers_only(**changes: Any) -> Any:
    return grid(agreement=False, physics=False, alone=0, snapshots=0, **changes)


def by_key(rows: list[Row]) -> dict[Any, Row]:
    return {key_of(row): row for row in rows}


METHODS = ["snapkv", "adakv", "h2o", "lava", "kvzip", "sablock", "dbudgetkv"]


@pytest.mark.parametrize("size", [2, 5])
def test_the_same_rows_as_one_by_one(tmp_path: Path, size: int) -> None:
    made = answers_only(question="both", methods=METHODS, samples=4)
    together = by_key(run(tmp_path / "together", made, Uneven(), batch=size))
    single = by_key(run(tmp_path / "single", made, Uneven()))
    assert together.keys() == single.keys()
    for key, row in together.items():
        other = single[key]
        assert row["error"] is None
        assert row["batch"] == (1 if "random" in key[3] else min(size, 4))
        assert row["recipe"] == other["recipe"]
        assert "batch" not in other
        same = ("answers", "score", "new_tokens", "entries", "full_entries", "full_bytes", "prompt", "prompt_tokens")
        assert {name: row[name] for name in same} == {name: other[name] for name in same}, key
        assert row["bytes"] == pytest.approx(other["bytes"], rel=0.05)
        assert row["bytes"] - row["metadata_bytes"] == other["bytes"] - other["metadata_bytes"]


def test_prompts_differ_in_length(tmp_path: Path) -> None:
    rows = run(tmp_path, answers_only(samples=4), Uneven(), batch=4)
    assert len({row["prompt_tokens"] for row in rows}) == 4


def test_what_fails_together_is_done_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = by_key(run(tmp_path / "single", answers_only(samples=3)))

    def broken(*args: Any) -> Any:
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(batch, "say", broken)
    rows = by_key(run(tmp_path / "broken", answers_only(samples=3), batch=3))
    assert rows.keys() == wanted.keys()
    for key, row in rows.items():
        assert row["answers"] == wanted[key]["answers"]
        assert "batch" not in row


def test_samples_with_more_than_one_question_are_not_joined(tmp_path: Path) -> None:
    made = answers_only(question="both")
    rows = run(tmp_path, made, Toy(mode="multi_turn", turns=2), OtherToy(), batch=2)
    assert {row["task"] for row in rows if "batch" in row} == {"toy.other"}
    assert len(rows) == 2 * 2 * 2 * 5


def test_tasks_and_ways_to_ask_are_not_mixed() -> None:
    one = runner(answers_only(question="both", samples=3), Toy(), OtherToy(), batch=2)
    jobs = [*one._joined(one._jobs(_Empty(), set(), batch_progress(), (True, False)))]  # type: ignore[arg-type]
    assert all(isinstance(job, batch.Batch) for job in jobs)
    found = [[(job.sample.task, job.visible) for job in b.jobs] for b in jobs if isinstance(b, batch.Batch)]
    assert all(len(set(keys)) == 1 for keys in found)
    assert sorted(map(len, found)) == [1, 1, 1, 1, 2, 2, 2, 2]


class _Empty:
    session = 0
    snapshots = None


def batch_progress() -> Any:
    from kvthrift.eval.runner import Progress

    return Progress(0, 0)


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    made = answers_only(samples=3)
    whole = run(tmp_path, made, batch=3)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:7]))
    again = run(tmp_path, made, batch=3)
    assert by_key(again).keys() == by_key(whole).keys()
    answers = {key: row["answers"] for key, row in by_key(whole).items()}
    assert {key: row["answers"] for key, row in by_key(again).items()} == answers


def test_workers_take_batches(tmp_path: Path) -> None:
    made = answers_only(question="both", samples=4)
    wanted = by_key(run(tmp_path / "single", made, batch=2))
    found = by_key(run(tmp_path / "crew", made, batch=2, crew=Crew(2, ready)))
    assert {k: r["answers"] for k, r in found.items()} == {k: r["answers"] for k, r in wanted.items()}
    assert {row["batch"] for row in found.values()} == {1, 2}


def test_a_worker_that_dies_on_a_batch_costs_one_sample(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    crew = Crew(1, partial(fragile, tmp_path / "seen"))
    rows = run(tmp_path / "run", answers_only(samples=3), batch=3, crew=crew)
    failed = {row["sample"] for row in rows if row["error"]}
    assert failed == {"001"}
    assert len(rows) == 3 * 5


@pytest.mark.parametrize("kept", ["agreement", "physics"])
def test_a_batch_is_only_answered(kept: str) -> None:
    with pytest.raises(OptionError, match="--no-agreement"):
        runner(grid(**{"agreement": False, "physics": False, kept: True}), batch=2)
