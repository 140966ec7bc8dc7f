"""From rows to tables: arms compared on the samples that all of them have, with paired bootstrap intervals.

One table for visible and one for hidden questions; the two are never mixed. Failed rows count as a score of 0. Knows
nothing of how a table is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvthrift.errors import RunError
from kvthrift.eval.arm import FULL, Arm
from kvthrift.eval.folder import Run
from kvthrift.eval.metrics.interval import Interval, Means, paired_means
from kvthrift.eval.record import key_of
from kvthrift.eval.rows import Row
from kvthrift.eval.summary import agreement_of, cost_of, failures, flips_of, physics_of

ALL = "all"
SCALE = 100  # scores of 0 to 1 are shown as 0 to 100


@dataclass(frozen=True)
class Cell:
    """One arm on one task, or on all.

    Attributes:
        samples: compared.
        failed: how many of them failed, by reason.
        score: mean, 0 to 100.
        difference: to the full cache on the same samples.
        cost, agreement, flips, physics: see :mod:`kvthrift.eval.summary`.
    """

    samples: int
    failed: dict[str, int]
    score: Interval
    difference: Interval
    cost: dict[str, Any]
    agreement: dict[str, Any] | None
    flips: dict[str, Any]
    physics: dict[str, Any] | None


@dataclass(frozen=True)
class Line:
    """One arm: its cells by task, and under "all" over all tasks (scores weigh tasks alike)."""

    arm: Arm
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """Arms compared with the question visible, or hidden.

    Attributes:
        question: "visible" or "hidden".
        samples: compared, by task.
        waiting: samples that some arm has no row for yet, by task.
        lines: the full cache first.
        notes: what rows noted.
    """

    question: str
    samples: dict[str, int]
    waiting: dict[str, int]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


Scored = dict[str, list[list[Row]]]
"""Task -> arm -> rows, arms in order, the same samples in the same order for all."""


def tables(run: Run) -> tuple[Table, ...]:
    """The tables of a run, finished or not.

    Raises:
        RunError: it has no rows, none of its samples has a row of every arm, or rows of one sample are of different
            prompts.
    """
    if not run.rows:
        raise RunError(f"{run.path} holds no rows, so there is nothing to report. Start its run first.")
    rows = newest(run)
    found = [_table(run, question, rows) for question in ("hidden", "visible")]
    whole = tuple(table for table in found if table is not None)
    if not whole:
        raise RunError(
            f"{run.path} has {len(run.rows)} rows, but no sample that all {len(run.arms)} arms have answered yet, so "
            "nothing can be compared. Let the run go on."
        )
    return whole


def newest(run: Run) -> list[Row]:
    """The row that counts of each sample and arm, in the order of the grid."""
    found = {key_of(row): row for row in run.rows}  # a row that was measured again counts last
    return sorted(found.values(), key=lambda row: row.get("place", []))  # workers finish in any order


def compared(run: Run, question: str) -> Scored:
    """The rows behind the table of a question, for what looks at single samples."""
    return _scored(run, [row for row in newest(run) if row["question"] == question])[0]


def _table(run: Run, question: str, rows: Sequence[Row]) -> Table | None:
    asked = [row for row in rows if row["question"] == question]
    scored, waiting = _scored(run, asked)
    if not scored:
        return None
    notes = dict.fromkeys(row["note"] for row in asked if row.get("note"))
    counts = {task: len(lines[0]) for task, lines in scored.items()}
    return Table(question, counts, waiting, _lines(run.arms, scored), tuple(notes))


def _scored(run: Run, rows: Sequence[Row]) -> tuple[Scored, dict[str, int]]:
    """What is compared of the rows of one question, and how many samples wait, by task."""
    scored, waiting = Scored(), dict[str, int]()
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        samples = _by_sample(mine)
        whole = [found for found in samples.values() if len(found) == len(run.arms)]
        waiting[task] = len(samples) - len(whole)
        if whole:
            _check_pairs(run, whole)
            scored[task] = [[found[arm.name] for found in whole] for arm in run.arms]
    return scored, waiting


def _by_sample(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Sample -> arm -> row."""
    out: dict[str, dict[str, Row]] = {}
    for row in rows:
        out.setdefault(row["sample"], {})[row["arm"]] = row
    return out


def _check_pairs(run: Run, samples: Sequence[dict[str, Row]]) -> None:
    for found in samples:
        prompts = {row["prompt"] for row in found.values() if not row["error"]}
        if len(prompts) > 1:
            row = next(iter(found.values()))
            raise RunError(
                f"{run.path}: arms were given different prompts for sample {row['sample']} of {row['task']}, so they "
                "cannot be compared: its data or tokenizer changed between two starts. Begin in another folder."
            )


def _lines(arms: Sequence[Arm], scored: Scored) -> tuple[Line, ...]:
    numbers = {
        task: np.array([[SCALE * row["score"] for row in rows] for rows in lines]) for task, lines in scored.items()
    }
    reference = next(place for place, arm in enumerate(arms) if arm.name == FULL)
    means = paired_means(numbers, reference)
    return tuple(_line(arm, place, reference, means[place], scored) for place, arm in enumerate(arms))


def _line(arm: Arm, place: int, reference: int, means: Means, scored: Scored) -> Line:
    cells = {}
    for task, lines in scored.items():
        cells[task] = _cell(lines[place], lines[reference], means.tasks[task], means.differences[task])
    rows, full = ([row for lines in scored.values() for row in lines[which]] for which in (place, reference))
    return Line(arm, {ALL: _cell(rows, full, means.mean, means.difference), **cells})


def _cell(rows: list[Row], full: list[Row], score: Interval, difference: Interval) -> Cell:
    return Cell(
        samples=len(rows),
        failed=failures(rows),
        score=score,
        difference=difference,
        cost=cost_of(rows),
        agreement=agreement_of(rows, full),
        flips=flips_of(rows, full),
        physics=physics_of(rows),
    )
