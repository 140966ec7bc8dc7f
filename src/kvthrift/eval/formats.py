"""How a run's tables are written: Markdown and HTML for people, CSV and JSON for machines.

A format is a function from runs with their tables to text. Adding one touches the list below.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from kvthrift.eval.folder import Run
from kvthrift.eval.markdown import markdown
from kvthrift.eval.metrics.interval import Interval
from kvthrift.eval.report import html
from kvthrift.eval.table import Cell, Line, Table

Reported = Sequence[tuple[Run, tuple[Table, ...]]]
Format = Callable[[Reported], str]


def as_json(runs: Reported) -> str:
    """Everything, nested as it is."""
    return json.dumps([_run(run, tables) for run, tables in runs], indent=2, default=str) + "\n"


def _run(run: Run, tables: tuple[Table, ...]) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "grid": run.grid.plain(),
        "sessions": list(run.sessions),
        "tables": [_table(table) for table in tables],
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "question": table.question,
        "samples": table.samples,
        "waiting": table.waiting,
        "notes": list(table.notes),
        "arms": [_line(line) for line in table.lines],
    }


def _line(line: Line) -> dict[str, Any]:
    arm = line.arm
    named = {"arm": arm.name, "budget": arm.budget, "control": arm.control, "recipe": arm.recipe.plain()}
    return {**named, "tasks": {task: asdict(cell) for task, cell in line.cells.items()}}


def as_csv(runs: Reported) -> str:
    """One line for each arm and task, and one over all tasks; what is not known is empty."""
    lines = [
        {**_names(run, table, line), "task": task, **_numbers(cell)}
        for run, tables in runs
        for table in tables
        for line in table.lines
        for task, cell in line.cells.items()
    ]
    columns = dict.fromkeys(key for line in lines for key in line)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _names(run: Run, table: Table, line: Line) -> dict[str, Any]:
    return {
        "run": run.path.name,
        "model": run.grid.model or "smollm2",
        "commit": ", ".join(dict.fromkeys(session["commit"] for session in run.makers)),
        "question": table.question,
        "arm": line.arm.name,
        "budget": line.arm.budget,
        "control": line.arm.control,
    }


def _numbers(cell: Cell) -> dict[str, Any]:
    physics = dict(cell.physics or {})
    failures = {f"p_{key}": value for key, value in (physics.pop("failures", None) or {}).items()}
    return {
        "samples": cell.samples,
        "failed": sum(cell.failed.values()),
        **_bounds("score", cell.score),
        **_bounds("difference", cell.difference),
        **cell.cost,
        **(cell.agreement or {}),
        **cell.flips,
        **physics,
        **failures,
    }


def _bounds(name: str, found: Interval) -> dict[str, float | None]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


FORMATS: dict[str, Format] = {"md": markdown, "html": html, "csv": as_csv, "json": as_json}
