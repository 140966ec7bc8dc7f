"""Tables as the page shows them: each cell's text, the number it is sorted by, and a bar where that helps the eye.

The texts are those of :mod:`kvthrift.eval.columns`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvthrift.eval.arm import Arm
from kvthrift.eval.columns import Column, Section, sections
from kvthrift.eval.metrics.interval import Interval
from kvthrift.eval.table import ALL, SCALE, Line, Table

BARS = ("bytes held", "mean", "peak in prefill", "prefill s", "ms a token")

Cell = tuple[str, str, float | None, float | None]


def plain_sections(table: Table) -> list[dict[str, Any]]:
    """All tables of a run and question as plain data, with cells for every task and for all together."""
    return [_section(table, one) for one in sections(table)]


def _section(table: Table, section: Section) -> dict[str, Any]:
    tasks = [ALL, *table.samples] if len(table.samples) > 1 else [ALL]
    return {
        "title": section.title,
        "about": section.about.replace("`*`", "*"),
        "columns": [{"title": column.title, "task": column.task} for column in section.columns[1:]],
        "cells": {task: _cells(table, section.columns[1:], task) for task in tasks},
    }


def _cells(table: Table, columns: Sequence[Column], task: str) -> list[list[Cell]]:
    """One list a line of the table."""
    scaled = [(column, _most(table, column, task)) for column in columns]
    return [[_cell(column, line, task, most) for column, most in scaled] for line in table.lines]


def _cell(column: Column, line: Line, task: str, most: float | None) -> Cell:
    """Text, the smaller note behind it, what it is sorted by (None: nothing), and the bar in percent (None: none)."""
    main, bracket, rest = column.text(line, task).partition(" [")
    number = _number(column.value(line, task))
    bar = None if not most or number is None else round(100 * number / most, 1)
    return main, bracket.strip() + rest, number, bar


def _number(value: Any) -> float | None:
    if isinstance(value, Interval):
        return value.mean
    if isinstance(value, dict):
        return float(sum(value.values()))
    return None if value is None else float(value)


def _most(table: Table, column: Column, task: str) -> float | None:
    """What a full bar stands for; None where a column has none."""
    if column.title not in BARS:
        return None
    found = [column.value(line, task) for line in table.lines]
    if isinstance(found[0], Interval):
        return SCALE
    return max(filter(None, map(_number, found)), default=None)


def plain_arm(arm: Arm) -> dict[str, Any]:
    """An arm as filters and plots know it."""
    return {"arm": arm.name, "method": arm.recipe.name, "budget": arm.budget, "control": arm.control}
