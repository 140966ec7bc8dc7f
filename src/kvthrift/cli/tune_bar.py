"""A progress bar for a search, with the best so far; lines now and then where there is no terminal."""

from __future__ import annotations

from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kvthrift.tune.aim import Aim, Measured
from kvthrift.tune.search import Progress

EVERY = 30.0  # seconds between lines


def said(aim: Aim, found: Measured) -> str:
    """What was measured, in a few words."""
    return (
        f"{aim.judges} {aim.quality_of(found):.1%}, {found.bytes / 2**20:.2f} MiB held "
        f"({found.bytes / found.full_bytes:.1%} of the full cache)"
    )


class TuneBar:
    """Use as a context; :meth:`tell` is what a search calls."""

    def __init__(self, console: Console, aim: Aim) -> None:
        self._console, self._aim = console, aim
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]recipes"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("Reading the prompts", total=None)
        self._said = monotonic()
        self._best = -1

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """Show how far a search is, and the best so far when that changes."""
        best = progress.best
        self._bar.update(self._task, total=progress.total, completed=progress.done, description="Searching")
        if best is not None and best.measured is not None and best.number != self._best:
            self._best = best.number
            self._console.print(
                f"trial {best.number}: {said(self._aim, best.measured)}", soft_wrap=True, highlight=False
            )
        now = monotonic()
        if not self._console.is_terminal and now - self._said >= EVERY:
            self._said = now
            self._console.print(f"{progress.done} of {progress.total} recipes", soft_wrap=True, highlight=False)
