"""Which page is made of what: runs with their tables, or snapshots by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvthrift.eval.folder import Run
from kvthrift.eval.report import curves
from kvthrift.eval.report.groups import choices, group, names_of
from kvthrift.eval.report.shell import fill
from kvthrift.eval.report.snapshots import plain
from kvthrift.eval.snapshot import Snapshot, read_snapshots
from kvthrift.eval.table import Table, compared

EMBEDDED = "smollm2 (embedded)"


def html(runs: Sequence[tuple[Run, tuple[Table, ...]]]) -> str:
    """All tables of all runs, with plots, as one page that needs no network.

    Raises:
        MissingPackageError: a package that pages are made with is not installed.
        RunError: a run's snapshots are damaged.
    """
    names = names_of([run for run, _ in runs])
    named = [(name, run, tables) for name, (run, tables) in zip(names, runs, strict=True)]
    pairs = [(name, run, table) for name, run, tables in named for table in tables]
    groups = [group(name, run, table, number) for number, (name, run, table) in enumerate(pairs)]
    found = choices(groups)
    inside = plain([(name, read_snapshots(run.path)) for name, run, _ in named])
    needles = [
        {"run": name, "model": run.grid.model or EMBEDDED, **one}
        for name, run, table in pairs
        for one in curves.needles(run, table.question, compared(run, table.question))
    ]
    arms = {arm["arm"]: arm for one in groups for arm in one["arms"]}
    data = {**found, "groups": groups, "needles": needles, "arms": arms, "inside": inside}
    return fill(
        "report.html",
        title=_title(names),
        data=data,
        runs=[_origin(name, run) for name, run, _ in named],
        groups=groups,
        choices=found,
        needles=needles,
        inside=inside,
    )


def inspect_page(snapshots: Sequence[Snapshot], *, title: str, facts: Mapping[str, str]) -> str:
    """A page of what caches held: budgets by layer and head, and kept tokens painted over the text.

    Args:
        snapshots: of any number of texts and arms, in the order they are offered.
        title: of the page.
        facts: what the reader should know beside it (model, device, versions, command), shown as they are.

    Returns:
        HTML that needs no network.

    Raises:
        MissingPackageError: a package that pages are made with is not installed.
    """
    inside = plain([("", snapshots)])
    return fill("inspect.html", title=title, data={"inside": inside}, facts=dict(facts), inside=inside)


def _title(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more runs"


def _origin(name: str, run: Run) -> dict[str, Any]:
    """With what a run was made: every start that made rows."""
    grid, makers = run.grid, run.makers
    asked = {"both": "hidden and visible"}.get(grid.question, grid.question)
    facts = {
        "Model": f"{grid.model or EMBEDDED}, {_distinct(makers, 'dtype')}",
        "Device": _distinct(makers, "device"),
        "Question": asked,
        "Tasks": ", ".join(grid.tasks),
        "Samples": f"{grid.samples} a task, {grid.length} tokens each, seed {grid.seed}",
        "Pages": f"{grid.page} entries",
        "Versions": "; ".join(dict.fromkeys(_versions(session) for session in makers)),
        "Started": _distinct(makers, "started").replace("T", " ").replace("+00:00", " UTC"),
    }
    commands = list(dict.fromkeys(session["command"] for session in makers))
    return {"name": name, "facts": {key: value for key, value in facts.items() if value}, "commands": commands}


def _distinct(makers: Sequence[Mapping[str, str]], name: str) -> str:
    return ", ".join(dict.fromkeys(maker[name] for maker in makers if name in maker))


def _versions(session: Mapping[str, str]) -> str:
    names = ("kvthrift", "torch", "transformers", "python")
    found = ", ".join(f"{name} {session[name]}" for name in names if name in session)
    return f"{found}, commit {session['commit']}"
