"""A run in plain words: which method did best, how small a cache still does nearly as well, and what to be wary of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvthrift.eval.arm import FULL
from kvthrift.eval.columns import show_interval, show_percent
from kvthrift.eval.table import ALL, SCALE, Cell, Line, Table
from kvthrift.runtime.report import show_bytes

NEAR = 5  # points below the full cache that count as nearly as good
FEW = 30  # samples a task below which intervals are wide
POOR = 20  # a score of the full cache below which there is little to lose
MEANT = {"random": "random eviction", "streamingllm": "sinks and recent tokens only (streamingllm)"}


@dataclass(frozen=True)
class Words:
    """Sentences on what came out, and sentences of warning."""

    said: tuple[str, ...]
    warned: tuple[str, ...]


def in_short(table: Table) -> Words:
    """What a table says, for somebody who has never seen one."""
    full = next(line for line in table.lines if line.arm.name == FULL)
    methods = [line for line in table.lines if not line.arm.control and line.arm.name != FULL]
    if not methods:
        return Words(("Only the full cache and the controls were run.",), tuple(_warnings(table, full, None, ())))
    best = min(methods, key=lambda line: (-_score(line), _bytes(line)))
    said = (_best(best, full), _smallest(methods, full), *_controls(table, best))
    return Words(said, tuple(_warnings(table, full, best, methods)))


def _cell(line: Line) -> Cell:
    return line.cells[ALL]


def _score(line: Line) -> float:
    return _cell(line).score.mean


def _bytes(line: Line) -> float:
    found: float | None = _cell(line).cost["bytes"]
    return float("inf") if found is None else found


def _named(line: Line) -> str:
    return f"{line.arm.recipe.name} at a budget of {line.arm.budget}"


def _held(line: Line) -> str:
    cost = _cell(line).cost
    return (
        ""
        if cost["bytes"] is None
        else f", holding {show_bytes(cost['bytes'])} ({show_percent(cost['share'])} of full)"
    )


def _best(best: Line, full: Line) -> str:
    return (
        f"Best score: {_named(best)}, {show_interval(_cell(best).score)} of 100{_held(best)}. The full cache scores "
        f"{show_interval(_cell(full).score)}."
    )


def _smallest(methods: Sequence[Line], full: Line) -> str:
    near = [line for line in methods if _score(line) >= _score(full) - NEAR and _bytes(line) < float("inf")]
    if not near:
        return f"No method came within {NEAR} points of the full cache."
    found = min(near, key=lambda line: (_bytes(line), -_score(line)))
    return f"Smallest cache within {NEAR} points of the full one: {_named(found)}, {_score(found):.1f}{_held(found)}."


def _controls(table: Table, best: Line) -> Iterator[str]:
    beside = [line for line in table.lines if line.arm.control and line.arm.budget == best.arm.budget]
    if beside:
        parts = [f"{MEANT.get(line.arm.recipe.name, line.arm.recipe.name)} {_score(line):.1f}" for line in beside]
        yield f"Controls at the same budget of {best.arm.budget}: {', '.join(parts)}."


def _warnings(table: Table, full: Line, best: Line | None, methods: Sequence[Line]) -> Iterator[str]:
    fewest = min(table.samples.values())
    if fewest < FEW:
        count = f"{fewest} sample{'s' if fewest > 1 else ''}"
        yield f"Few samples: {count} a task, so one answer moves a task's score by {SCALE / fewest:.0f} points."
    if best is not None:
        yield from _overlaps(table, best, methods)
    if _score(full) < POOR:
        yield f"The full cache itself scores only {_score(full):.1f}, so there is little that compression could lose."
    failed = sum(sum(_cell(line).failed.values()) for line in table.lines)
    if failed:
        yield f"{failed} answers failed and count as 0; they are listed below."
    if waiting := sum(table.waiting.values()):
        what = "1 sample waits" if waiting == 1 else f"{waiting} samples wait"
        yield f"The run is not finished: {what} for some method, and nothing of it is counted."


def _overlaps(table: Table, best: Line, methods: Sequence[Line]) -> Iterator[str]:
    equal = [line.arm.name for line in methods if line is not best and _overlap(line, best)]
    if equal:
        yield f"Not settled which method is best: the interval of {best.arm.name} overlaps with {_listed(equal)}."
    controls = [line for line in table.lines if line.arm.control and line.arm.name != FULL]
    beside = [line.arm.name for line in controls if line.arm.budget == best.arm.budget and _overlap(line, best)]
    if beside:
        yield f"{best.arm.name} is not shown to beat the controls: its interval overlaps with {_listed(beside)}."
    above = [line.arm.name for line in controls if _score(line) > _score(best)]
    if above:
        yield f"No method did as well as the best control: {_listed(above)} scored more than {best.arm.name}."


def _listed(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    shown = list(names[:4]) + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _overlap(one: Line, other: Line) -> bool:
    """Whether intervals overlap, or are not known."""
    a, b = _cell(one).score, _cell(other).score
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return True
    return a.low <= b.high and b.low <= a.high
