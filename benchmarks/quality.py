"""What each method's answers are worth: the quality table of the README, made by `kvthrift eval`.

    python benchmarks/quality.py --out results/quality --workers 12

Needle tasks (RULER's and a plain one) that the embedded model answers well enough for a difference to show, 4,096
tokens long; every method at every budget, beside the full cache, random eviction and sinks with recent entries, with
the question hidden and visible, all on the same samples. Started again, it goes on where it was cut short. Needs no
network. Writes FOLDER/run (rows), FOLDER/report.md (every table there is) and FOLDER/quality.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import kvthrift
from kvthrift.eval.folder import Run, read_run
from kvthrift.eval.markdown import provenance
from kvthrift.eval.metrics.interval import Interval
from kvthrift.eval.table import ALL, Cell, Line, Table, tables
from kvthrift.integrations.transformers.embedded import embedded_path

TASKS = "ruler.niah_single_2,ruler.niah_multikey_1,ruler.niah_multivalue,niah.number"
CONTROLS = ("full", "random", "streamingllm")


def methods() -> list[str]:
    """Every method, the controls first."""
    return [*CONTROLS, *(name for name in kvthrift.methods() if name not in CONTROLS)]


def score(found: Interval) -> str:
    """``41 (35-48)``."""
    bounds = "" if found.low is None or found.high is None else f" ({found.low:.0f}-{found.high:.0f})"
    return f"{found.mean:.0f}{bounds}"


def cell(found: Cell) -> str:
    """Score and interval."""
    failed = sum(found.failed.values())
    return score(found.score) + (f", {failed} failed" if failed else "")


def held(lines: Sequence[Line]) -> str:
    """Bytes held as a share of the full cache's: fewest and most of several methods."""
    shares = sorted({f"{line.cells[ALL].cost['share']:.0%}" for line in lines}, key=lambda text: int(text[:-1]))
    return shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"


def named(name: str) -> str:
    """The reference in bold, controls in italics."""
    return f"**{name}**" if name == "full" else f"*{name}*" if name in CONTROLS else name


def grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_arm(table: Table) -> dict[tuple[str, str], Line]:
    """Lines by method and budget."""
    return {(line.arm.name.partition("@")[0], line.arm.budget): line for line in table.lines}


def compact(found: Sequence[Table], budgets: Sequence[str]) -> str:
    """Methods as rows, budgets and ways to ask as columns, means over tasks; those that find their own budget last."""
    columns = [(by_arm(table), table.question, budget) for budget in budgets for table in reversed(found)]
    body = [["bytes held", *(held([x for (n, b), x in lines.items() if b == size]) for lines, _, size in columns)]]
    for method in [*methods(), *sorted({name for lines, *_ in columns for name, _ in lines} - set(methods()))]:
        cells = [lines.get((method, "all" if method == "full" else size)) for lines, _, size in columns]
        if any(cells):
            body.append([named(method), *("-" if line is None else cell(line.cells[ALL]) for line in cells)])
    table = grid(["method", *(f"{size} {question}" for _, question, size in columns)], body)
    return "\n\n".join((table, *own(found)))


def own(found: Sequence[Table]) -> list[str]:
    """A sentence for each method that finds its own budget."""
    lines = [(table.question, line) for table in reversed(found) for line in table.lines if line.arm.budget == "own"]
    names = dict.fromkeys(line.arm.name.partition("@")[0] for _, line in lines)
    parts = {name: [one for one in lines if one[1].arm.name.startswith(f"{name}@")] for name in names}
    return [
        f"{name} finds its own budget: "
        + "; ".join(f"{cell(line.cells[ALL])} {question}, holding {held([line])}" for question, line in of_name)
        + "."
        for name, of_name in parts.items()
    ]


def by_task(table: Table) -> str:
    """Every method at every budget as a row, tasks as columns."""
    tasks = list(table.samples)
    body = [[line.arm.name, *(score(line.cells[task].score) for task in tasks)] for line in table.lines]
    return grid([f"question {table.question}", *tasks], body)


def written(run: Run, found: Sequence[Table], budgets: Sequence[str]) -> tuple[str, str]:
    """What is printed, and what the results file has beyond it."""
    cut = f"answers cut at {run.grid.max_new_tokens} tokens; " if run.grid.max_new_tokens else ""
    samples = "; ".join(
        f"question {table.question}: {', '.join(f'{count} of {task}' for task, count in table.samples.items())}"
        for table in found
    )
    about = (
        f"{provenance(run)}\n\nCells: mean score over {len(found[0].samples)} tasks, 0 to 100 (95% interval, paired "
        f"bootstrap); bytes held after compression, of those of the full cache's keys and values; {cut}where every "
        f"sample scored alike an interval is a point, which says that there were few. Samples compared: {samples}."
    )
    main = f"{compact(found, budgets)}\n\n{about}\n"
    return main, "\n\n".join(f"By task, question {table.question}:\n\n{by_task(table)}" for table in found) + "\n"


def evaluate(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a process that is interrupted, not left behind, when this one is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            report = process.communicate()[0]
        except BaseException:
            process.send_signal(signal.SIGINT)
            raise
    return process.returncode, report


def main(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where rows and tables go")],
    chosen: Annotated[str, typer.Option("--methods", metavar="A,B,...", help="all by default")] = "",
    budgets: str = "512,256,128",
    tasks: str = TASKS,
    samples: Annotated[int, typer.Option(help="of each task")] = 15,
    length: int = 4096,
    question: Annotated[str, typer.Option(help="visible, hidden or both")] = "both",
    max_new_tokens: Annotated[int, typer.Option(help="answers are cut there; 0 for the tasks' own limits")] = 48,
    workers: int = 1,
    batch: Annotated[int, typer.Option(help="samples of a task answered together")] = 1,
    model: Annotated[str, typer.Option(help="the embedded one by default")] = "",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    agreement: Annotated[bool, typer.Option(help="follow the full cache's answers too: twice the time")] = False,
    physics: Annotated[bool, typer.Option(help="look up what eviction did, too")] = False,
    commit: Annotated[str, typer.Option(help="where there is no git to ask")] = "",
    data: Annotated[str, typer.Option(help="folder of local data sets, for tasks that need one")] = "",
    recipes: Annotated[str, typer.Option(metavar="A.toml,B.toml,...", help="recipes beside the methods")] = "",
) -> None:
    """Run the grid, or go on with it, and print its tables."""
    if not model:
        embedded_path()  # unpacked once, before workers look for it
    words = {
        "--out": out / "run", "--methods": chosen or ",".join(methods()), "--budgets": budgets, "--tasks": tasks,
        "--samples": samples, "--length": length, "--question": question, "--max-new-tokens": max_new_tokens,
        "--workers": workers, "--batch": batch, "--model": model, "--dtype": dtype, "--device": device, "--seed": seed,
        "--data": data, "--recipes": recipes,
    }  # fmt: skip
    given = [str(part) for word, value in words.items() if value not in ("", 0) for part in (word, value)]
    given += ["--alone", "0", "--snapshots", "0"]
    given += ["--no-agreement"] * (not agreement) + ["--no-physics"] * (not physics)
    environment = {**os.environ, **({"KVTHRIFT_COMMIT": commit} if commit else {})}
    out.mkdir(parents=True, exist_ok=True)
    code, report = evaluate([sys.executable, "-m", "kvthrift", "eval", *given], environment)
    if code:
        raise typer.Exit(code)
    (out / "report.md").write_text(report, encoding="utf-8")
    run = read_run(out / "run")
    shown, more = written(run, tables(run), budgets.split(","))
    (out / "quality.md").write_text(f"{shown}\n{more}", encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    typer.run(main)
