"""Runs as the page shows them: one group for each run and question, and what is shown across runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvthrift.eval.arm import CONTROLS, FULL
from kvthrift.eval.folder import Run
from kvthrift.eval.markdown import ASKED, state
from kvthrift.eval.report import curves
from kvthrift.eval.report.cells import plain_arm, plain_sections
from kvthrift.eval.report.words import in_short
from kvthrift.eval.table import ALL, Table, compared, newest

Plain = dict[str, Any]


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, or its whole path where two folders have one name."""
    short = [run.path.name or str(run.path) for run in runs]
    return [name if short.count(name) == 1 else str(run.path) for name, run in zip(short, runs, strict=True)]


def group(name: str, run: Run, table: Table, number: int) -> Plain:
    """Everything that is shown of one run and question."""
    scored = compared(run, table.question)
    words = in_short(table)
    return {
        "id": f"group-{number}",
        "run": name,
        "question": table.question,
        "asked": ASKED[table.question],
        "state": state(run, table),
        "said": words.said,
        "warned": words.warned,
        "tasks": list(table.samples),
        "arms": [plain_arm(line.arm) for line in table.lines],
        "sections": plain_sections(table),
        "points": _points(table),
        "agreement": curves.agreement(scored),
        "failures": _failures(run, table.question),
    }


def _points(table: Table) -> dict[str, list[Plain]]:
    """Score and bytes of every arm, by task."""
    tasks = [ALL, *table.samples] if len(table.samples) > 1 else [ALL]
    return {
        task: [
            {
                "mean": line.cells[task].score.mean,
                "low": line.cells[task].score.low,
                "high": line.cells[task].score.high,
                "bytes": line.cells[task].cost["bytes"],
                "share": line.cells[task].cost["share"],
                "samples": line.cells[task].samples,
            }
            for line in table.lines
        ]
        for task in tasks
    }


def _failures(run: Run, question: str) -> list[Plain]:
    """Rows that failed, those of one reason, message, arm and task together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in newest(run):
        if row["question"] == question and row["error"]:
            key = (row["arm"], row["task"], row["error"]["reason"], row["error"]["message"])
            found.setdefault(key, []).append(row["sample"])
    by_name = {arm.name: plain_arm(arm) for arm in run.arms}
    return [
        {**by_name[arm], "task": task, "reason": reason, "message": message, "samples": samples}
        for (arm, task, reason, message), samples in found.items()
    ]


def choices(groups: Sequence[Plain]) -> Plain:
    """What can be filtered by, in the order it appears; controls behind methods."""
    arms = [arm for one in groups for arm in one["arms"]]
    methods = dict.fromkeys(arm["method"] for arm in sorted(arms, key=lambda arm: arm["control"]))
    return {
        "arms": list(dict.fromkeys(arm["arm"] for arm in arms if not arm["control"])),
        "runs": list(dict.fromkeys(one["run"] for one in groups)),
        "questions": list(dict.fromkeys(one["question"] for one in groups)),
        "methods": list(methods),
        "controls": [name for name in (FULL, *CONTROLS) if name in methods],
        "budgets": list(dict.fromkeys(arm["budget"] for arm in arms if arm["method"] != FULL)),
        "tasks": list(dict.fromkeys(task for one in groups for task in one["tasks"])),
    }
