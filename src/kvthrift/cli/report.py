"""``kvthrift report``: the tables of runs that are finished or under way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvthrift.cli import options as o
from kvthrift.cli.eval import format_of
from kvthrift.cli.files import check_target, write_whole
from kvthrift.eval.folder import read_run
from kvthrift.eval.formats import FORMATS
from kvthrift.eval.table import tables

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that 'kvthrift eval' wrote to.")]
Shown = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"Of the tables: {', '.join(FORMATS)}. [dim]\\[as --out ends, else md][/dim]",
        rich_help_panel=o.OUTPUT,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write there instead of printing; .html is a page.", rich_help_panel=o.OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Let --out overwrite a file.", rich_help_panel=o.OUTPUT)]


def report(runs: Runs, format: Shown = None, out: Out = None, force: Force = False, debug: o.Debug = False) -> None:
    """Print the tables of runs: scores, agreement with the full cache, what eviction did, and cost.

    As a page (--out page.html) they come with plots and filters, in one file that needs no network.
    """
    show = format_of(format or _format_by(out))
    if out is not None:
        check_target(out, force=force)
    found = [read_run(path) for path in runs]
    text = show([(run, tables(run)) for run in found])
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text, force=force)


def _format_by(out: Path | None) -> str:
    """The format that a file's ending names; Markdown where it names none."""
    ending = out.suffix.lower().removeprefix(".") if out is not None else ""
    return ending if ending in FORMATS else "md"
