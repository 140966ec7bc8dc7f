"""The columns of a run's tables: which number stands where, how it is written, and what it means.

Every format that people read shows these, so that one number never has two spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvthrift.eval.metrics.interval import Interval
from kvthrift.eval.summary import GONE, HORIZON, RIGHT
from kvthrift.eval.table import ALL, Line, Table
from kvthrift.runtime.report import show_bytes

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: as it stands on top.
        pick: an arm's value on a task, or on "all"; None if there is none.
        show: a value that is there, as text.
        task: the task it is of, whichever is looked at; empty if it follows.
    """

    title: str
    pick: Callable[[Line, str], Any]
    show: Callable[[Any], str]
    task: str = ""

    def value(self, line: Line, task: str = ALL) -> Any:
        """An arm's value, on a task or on all."""
        return self.pick(line, self.task or task)

    def text(self, line: Line, task: str = ALL) -> str:
        """The same, written out."""
        found = self.value(line, task)
        return NOTHING if found is None else self.show(found)


@dataclass(frozen=True)
class Section:
    """One table of a run: its title, its columns, and what they mean."""

    title: str
    columns: tuple[Column, ...]
    about: str


def sections(table: Table, *, bounds: bool = True) -> tuple[Section, ...]:
    """All tables of a run: scores, agreement, what eviction did, cost.

    Args:
        table: what they show.
        bounds: whether columns of single tasks have their intervals.
    """
    return _scores(table, bounds), _agreement(), _physics(), _cost(table)


def _scores(table: Table, bounds: bool) -> Section:
    tasks = list(table.samples)
    columns = [*_named(), Column("mean", _score, show_interval), Column("minus full", _difference, _show_difference)]
    if len(tasks) > 1:
        columns += [Column(task, _score, show_interval if bounds else _show_mean, task) for task in tasks]
    columns.append(Column("failed", _failed, _show_failed))
    return Section(
        "Scores",
        tuple(columns),
        "Scores 0 to 100 with 95% paired bootstrap intervals; the mean weighs tasks alike; `*`: the difference to "
        "the full "
        "cache excludes zero; failed samples count as 0. Bytes are those of live tensors, metadata included. A "
        "budget counts entries unless it is given in bytes, so arms of one budget, controls too, may differ in bytes.",
    )


def _agreement() -> Section:
    columns = (
        *_named(),
        _of("agreement", "first_token", "first token", show_percent),
        _of("agreement", "mismatch", "mismatch", show_percent),
        _of("agreement", "mismatch_where_right", "mismatch where full is right", show_percent),
        _of("agreement", "top1", "top-1", show_percent),
        _of("agreement", "kl", "KL", _small),
        _of("agreement", "identical", "identical", show_percent),
        _of("agreement", f"agree_{HORIZON}", f"agree {HORIZON} steps", show_percent),
        _of("agreement", "median_divergence", "median divergence", _whole),
        _of("flips", "right_to_wrong", "right to wrong", _whole),
        _of("flips", "wrong_to_right", "wrong to right", _whole),
    )
    return Section(
        "Agreement with the full cache",
        columns,
        "The full cache's greedy answer, fed token by token. Mismatch: another token is likelier, first tokens left "
        "out; KL in "
        "nats a step; identical: answers that never part; the full cache's own line is one pass against step by "
        f"step, the noise of the arithmetic. Right: a score of {RIGHT} or more.",
    )


def _physics() -> Section:
    columns = (
        *_named(),
        _of("physics", "removed", "removed", show_percent),
        _of("physics", "evicted_layer", "evicted, layer", show_percent),
        _of("physics", "evicted_model", "evicted, model", show_percent),
        _of("physics", "ger_layer", "GER, layer", show_percent),
        _of("physics", "chance_layer", "by chance", show_percent),
        _of("physics", "ger_model", "GER, model", show_percent),
        _of("physics", "chance_model", "by chance", show_percent),
        _of("physics", "consensus", "consensus", _small),
        _of("physics", "rigidity", "rigidity", _small),
        _split("erased", "P(erased)"),
        _split("failed_if_erased", "P(fail given erased)"),
        _split("failed_if_kept", "P(fail given kept)"),
        _split("failed", "P(fail)"),
        _of("physics", "alarm", "alarm", lambda value: "yes" if value else ""),
    )
    return Section(
        "What eviction did",
        columns,
        "Evicted: context tokens that no head of a layer (of the model) kept. GER: the same of tokens that hold a "
        "gold answer; "
        "by chance: if heads dropped as many tokens independently at random. Consensus: different tokens that heads "
        "look at "
        "most, as a share of heads; low is rigid. Erased: half of what the answer needs, layer by layer, is gone "
        f"({GONE:.0%}). Alarm: GER of a layer from 10% or 90% removed.",
    )


def _cost(table: Table) -> Section:
    timed = table.lines[0].cells[ALL].cost["timed"]
    samples = "1 sample" if timed == 1 else f"{timed} samples"
    columns = (
        *_named(),
        _of("cost", "entries", "entries", _whole),
        _of("cost", "metadata_bytes", "metadata", show_bytes),
        _of("cost", "read_bytes", "read a step", show_bytes),
        _of("cost", "peak_bytes", "peak in prefill", show_bytes),
        _of("cost", "prefill_seconds", "prefill s", _small),
        _of("cost", "compression_seconds", "compression s", _small),
        _of("cost", "step_seconds", "ms a token", lambda value: f"{1000 * value:.3g}"),
    )
    return Section(
        "Cost",
        columns,
        f"Seconds and peak are of the {samples} on which each arm read the prompt by itself, with no other "
        "worker beside it; elsewhere one "
        "reading serves all arms, and its time is nobody's own. Prefill includes compression.",
    )


# -- values ------------------------------------------------------------------------------------------------------


def _named() -> Sequence[Column]:
    return (
        Column("arm", lambda line, _: line.arm, lambda arm: f"{arm.name} (control)" if arm.control else arm.name),
        _of("cost", "bytes", "bytes held", show_bytes),
        _of("cost", "share", "of full", show_percent),
    )


def _of(part: str, name: str, title: str, show: Callable[[Any], str]) -> Column:
    def pick(line: Line, task: str) -> Any:
        found = getattr(line.cells[task], part)
        return None if found is None else found[name]

    return Column(title, pick, show)


def _split(name: str, title: str) -> Column:
    def pick(line: Line, task: str) -> Any:
        physics = line.cells[task].physics
        split = None if physics is None else physics["failures"]
        return None if split is None else split[name]

    return Column(title, pick, show_percent)


def _score(line: Line, task: str) -> Interval:
    return line.cells[task].score


def _difference(line: Line, task: str) -> Interval:
    return line.cells[task].difference


def _failed(line: Line, task: str) -> dict[str, int]:
    return line.cells[task].failed


# -- spellings ---------------------------------------------------------------------------------------------------


def show_interval(found: Interval) -> str:
    """``75.0 [50.0, 100.0]``."""
    bounds = "" if found.low is None or found.high is None else f" [{found.low:.1f}, {found.high:.1f}]"
    return _show_mean(found) + bounds


def show_percent(value: float) -> str:
    """``12.5%``."""
    return f"{100 * value:.1f}%"


def _show_mean(found: Interval) -> str:
    return f"{found.mean:.1f}"


def _show_difference(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]{'*' if found.excludes_zero else ''}"


def _show_failed(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in found.items()) or "0"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"
