"""Tables of a run in Markdown: scores, agreement with the full cache, what eviction did, and cost.

Every table says whether the question was visible and what each arm held in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvthrift.eval.folder import Run
from kvthrift.eval.summary import GONE, HORIZON, RIGHT
from kvthrift.eval.table import ALL, Line, Table
from kvthrift.runtime.report import show_bytes

NOTHING = "-"
WIDE = 4  # tasks; with more, their columns go without intervals
ASKED = {
    "hidden": "question hidden: the context was compressed before it was seen",
    "visible": "question visible: it was read with the context, and compressed with it",
}

Column = tuple[str, Callable[[Line], str]]


def markdown(runs: Sequence[tuple[Run, tuple[Table, ...]]]) -> str:
    """All tables of all runs."""
    return "\n".join(_run(run, tables) for run, tables in runs)


def _run(run: Run, tables: Sequence[Table]) -> str:
    parts = [f"# {run.path.name}", provenance(run)]
    for table in tables:
        parts.append(f"## {ASKED[table.question][0].upper()}{ASKED[table.question][1:]}\n\n{_state(run, table)}")
        for title, columns, about in (_scores(table), _agreement(table), _physics(table), _cost(table)):
            parts.append(f"### {title} (question {table.question})\n\n{_grid(table, columns)}\n\n{about}")
    return "\n\n".join(parts) + "\n"


def provenance(run: Run) -> str:
    """What was run, with what, on what."""
    grid, last = run.grid, run.sessions[-1]
    made = ", ".join(dict.fromkeys(_versions(session) for session in run.sessions))
    return (
        f"Model {grid.model or 'smollm2 (embedded)'} ({last['dtype']}) on {last['device']}; samples of {grid.length} "
        "tokens, "
        f"{grid.samples} a task, seed {grid.seed}; pages of {grid.page} entries; {made}.\n\n`{last['command']}`"
    )


def _versions(session: dict[str, str]) -> str:
    return (
        f"kvthrift {session['kvthrift']} at commit {session['commit']} with torch {session['torch']} and transformers "
        f"{session['transformers']}"
    )


def _state(run: Run, table: Table) -> str:
    """How many samples are compared, and what is not."""
    counts = ", ".join(f"{task} {count}" for task, count in table.samples.items())
    text = f"Compared on the samples that all {len(run.arms)} arms have: {counts}."
    waiting = sum(table.waiting.values())
    if waiting:
        text += f" {waiting} more are not through all arms yet and are left out."
    for note in table.notes:
        text += f" Note: {note}."
    return text


def _grid(table: Table, columns: Sequence[Column]) -> str:
    head = "| " + " | ".join(name for name, _ in columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    body = ["| " + " | ".join(show(line) for _, show in columns) + " |" for line in table.lines]
    return "\n".join([head, rule, *body])


# -- tables ------------------------------------------------------------------------------------------------------


def _scores(table: Table) -> tuple[str, list[Column], str]:
    tasks = list(table.samples)
    bounds = len(tasks) <= WIDE
    columns = [*_named(), ("mean", _score(ALL)), ("minus full", _difference)]
    if len(tasks) > 1:
        columns += [(task, _score(task, bounds)) for task in tasks]
    columns.append(("failed", _failed))
    about = (
        "Scores 0 to 100 with 95% paired bootstrap intervals; the mean weighs tasks alike; `*`: the difference to "
        "the full "
        "cache excludes zero; failed samples count as 0. Bytes are those of live tensors, metadata included."
    )
    return "Scores", columns, about


def _agreement(table: Table) -> tuple[str, list[Column], str]:
    columns = [
        *_named(),
        ("first token", _of("agreement", "first_token", _percent)),
        ("mismatch", _of("agreement", "mismatch", _percent)),
        ("mismatch where full is right", _of("agreement", "mismatch_where_right", _percent)),
        ("top-1", _of("agreement", "top1", _percent)),
        ("KL", _of("agreement", "kl", _small)),
        ("identical", _of("agreement", "identical", _percent)),
        (f"agree {HORIZON} steps", _of("agreement", f"agree_{HORIZON}", _percent)),
        ("median divergence", _of("agreement", "median_divergence", _whole)),
        ("right to wrong", _of("flips", "right_to_wrong", _whole)),
        ("wrong to right", _of("flips", "wrong_to_right", _whole)),
    ]
    about = (
        "The full cache's greedy answer, fed token by token. Mismatch: another token is likelier, first tokens left "
        "out; KL in "
        "nats a step; identical: answers that never part; the full cache's own line is one pass against step by "
        f"step, the noise of the arithmetic. Right: a score of {RIGHT} or more."
    )
    return "Agreement with the full cache", columns, about


def _physics(table: Table) -> tuple[str, list[Column], str]:
    columns = [
        *_named(),
        ("removed", _of("physics", "removed", _percent)),
        ("evicted, layer", _of("physics", "evicted_layer", _percent)),
        ("evicted, model", _of("physics", "evicted_model", _percent)),
        ("GER, layer", _of("physics", "ger_layer", _percent)),
        ("by chance", _of("physics", "chance_layer", _percent)),
        ("GER, model", _of("physics", "ger_model", _percent)),
        ("by chance", _of("physics", "chance_model", _percent)),
        ("consensus", _of("physics", "consensus", _small)),
        ("rigidity", _of("physics", "rigidity", _small)),
        ("P(erased)", _split("erased")),
        ("P(fail given erased)", _split("failed_if_erased")),
        ("P(fail given kept)", _split("failed_if_kept")),
        ("P(fail)", _split("failed")),
        ("alarm", _of("physics", "alarm", lambda value: "yes" if value else "")),
    ]
    about = (
        "Evicted: context tokens that no head of a layer (of the model) kept. GER: the same of tokens that hold a "
        "gold answer; "
        "by chance: if heads dropped as many tokens independently at random. Consensus: different tokens that heads "
        "look at "
        "most, as a share of heads; low is rigid. Erased: half of what the answer needs, layer by layer, is gone "
        f"({GONE:.0%}). Alarm: GER of a layer from 10% or 90% removed."
    )
    return "What eviction did", columns, about


def _cost(table: Table) -> tuple[str, list[Column], str]:
    timed = table.lines[0].cells[ALL].cost["timed"]
    columns = [
        *_named(),
        ("entries", _of("cost", "entries", _whole)),
        ("metadata", _of("cost", "metadata_bytes", show_bytes)),
        ("read a step", _of("cost", "read_bytes", show_bytes)),
        ("peak in prefill", _of("cost", "peak_bytes", show_bytes)),
        ("prefill s", _of("cost", "prefill_seconds", _small)),
        ("compression s", _of("cost", "compression_seconds", _small)),
        ("ms a token", _of("cost", "step_seconds", lambda value: f"{1000 * value:.3g}")),
    ]
    about = (
        f"Seconds and peak are of the {timed} samples on which each arm read the prompt by itself; elsewhere one "
        "reading serves all arms, and its time is nobody's own. Prefill includes compression."
    )
    return "Cost", columns, about


# -- cells -------------------------------------------------------------------------------------------------------


def _named() -> list[Column]:
    return [
        ("arm", lambda line: f"{line.arm.name} (control)" if line.arm.control else line.arm.name),
        ("bytes held", _of("cost", "bytes", show_bytes)),
        ("of full", _of("cost", "share", _percent)),
    ]


def _of(part: str, name: str, show: Callable[[Any], str]) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        found = getattr(line.cells[ALL], part)
        value = None if found is None else found[name]
        return NOTHING if value is None else show(value)

    return cell


def _split(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        physics = line.cells[ALL].physics
        split = None if physics is None else physics["failures"]
        return NOTHING if split is None or split[name] is None else _percent(split[name])

    return cell


def _score(task: str, bounds: bool = True) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        found = line.cells[task].score
        if found.low is None or found.high is None or not bounds:
            return f"{found.mean:.1f}"
        return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"

    return cell


def _difference(line: Line) -> str:
    found = line.cells[ALL].difference
    if found.low is None or found.high is None:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]{'*' if found.excludes_zero else ''}"


def _failed(line: Line) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in line.cells[ALL].failed.items()) or "0"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"
