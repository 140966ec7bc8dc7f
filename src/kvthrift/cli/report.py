"""``kvthrift report``: the tables of runs that are finished or under way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvthrift.cli import options as o
from kvthrift.cli.eval import format_of
from kvthrift.cli.files import check_target, write_whole
from kvthrift.errors import OptionError
from kvthrift.eval.folder import read_run
from kvthrift.eval.formats import FORMATS, Reported
from kvthrift.eval.table import tables
from kvthrift.tune.report import FORMATS as SEARCHES
from kvthrift.tune.report import is_study, read_study

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders that 'kvthrift eval' or 'kvthrift tune' wrote to.")
]
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

    Of a search: every recipe it measured, and the front. As a page (--out page.html) they come with plots and filters,
    in one file that needs no network.
    """
    show = format_of(format or _format_by(out))
    if out is not None:
        check_target(out, force=force)
    text = _searched(runs, format or _format_by(out)) if any(map(is_study, runs)) else show(_read(runs))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text, force=force)


def _read(runs: list[Path]) -> Reported:
    return [(run, tables(run)) for run in map(read_run, runs)]


def _searched(runs: list[Path], format: str) -> str:
    """Searches in one of their formats.

    Raises:
        OptionError: there are runs among them.
    """
    others = [str(path) for path in runs if not is_study(path)]
    if others:
        raise OptionError(f"{', '.join(others)} are no searches, and one report has runs or searches. Give them apart.")
    return SEARCHES[format]([read_study(path) for path in runs])


def _format_by(out: Path | None) -> str:
    """The format that a file's ending names; Markdown where it names none."""
    ending = out.suffix.lower().removeprefix(".") if out is not None else ""
    return ending if ending in FORMATS else "md"
