"""``kvthrift report``: the tables of runs that are finished or under way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvthrift.cli import options as o
from kvthrift.cli.eval import Shown, format_of
from kvthrift.cli.files import check_target, write_whole
from kvthrift.eval.folder import read_run
from kvthrift.eval.table import tables

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that 'kvthrift eval' wrote to.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write there instead of printing.", rich_help_panel=o.OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Let --out overwrite a file.", rich_help_panel=o.OUTPUT)]


def report(runs: Runs, format: Shown = "md", out: Out = None, force: Force = False, debug: o.Debug = False) -> None:
    """Print the tables of runs: scores, agreement with the full cache, what eviction did, and cost."""
    show = format_of(format)
    if out is not None:
        check_target(out, force=force)
    found = [read_run(path) for path in runs]
    text = show([(run, tables(run)) for run in found])
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text, force=force)
