"""Tables of a run in Markdown: scores, agreement with the full cache, what eviction did, and cost.

Every table says whether the question was visible and what each arm held in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from kvthrift.eval.columns import Column, sections
from kvthrift.eval.folder import Run
from kvthrift.eval.table import Table

WIDE = 4  # tasks; with more, their columns go without intervals
ASKED = {
    "hidden": "question hidden: the context was compressed before it was seen",
    "visible": "question visible: it was read with the context, and compressed with it",
}


def markdown(runs: Sequence[tuple[Run, tuple[Table, ...]]]) -> str:
    """All tables of all runs."""
    return "\n".join(_run(run, tables) for run, tables in runs)


def _run(run: Run, tables: Sequence[Table]) -> str:
    parts = [f"# {run.path.name}", provenance(run)]
    for table in tables:
        parts.append(f"## {ASKED[table.question][0].upper()}{ASKED[table.question][1:]}\n\n{state(run, table)}")
        for one in sections(table, bounds=len(table.samples) <= WIDE):
            parts.append(f"### {one.title} (question {table.question})\n\n{_grid(table, one.columns)}\n\n{one.about}")
    return "\n\n".join(parts) + "\n"


def provenance(run: Run) -> str:
    """What was run, with what, on what: of every start that made rows."""
    grid, makers = run.grid, run.makers
    made, dtypes, devices = (
        ", ".join(dict.fromkeys(map(say, makers))) for say in (_versions, itemgetter("dtype"), itemgetter("device"))
    )
    commands = "\n\n".join(f"`{command}`" for command in dict.fromkeys(maker["command"] for maker in makers))
    return (
        f"Model {grid.model or 'smollm2 (embedded)'} ({dtypes}) on {devices}; samples of {grid.length} tokens, "
        f"{grid.samples} a task, seed {grid.seed}; pages of {grid.page} entries; {made}.\n\n{commands}"
    )


def _versions(session: dict[str, str]) -> str:
    return (
        f"kvthrift {session['kvthrift']} at commit {session['commit']} with torch {session['torch']} and transformers "
        f"{session['transformers']}"
    )


def state(run: Run, table: Table) -> str:
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
    head = "| " + " | ".join(column.title for column in columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    body = ["| " + " | ".join(column.text(line) for column in columns) + " |" for line in table.lines]
    return "\n".join([head, rule, *body])
