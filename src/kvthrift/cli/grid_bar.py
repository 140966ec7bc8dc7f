"""A progress bar for a grid, which knows what is left; lines now and then where there is no terminal.

Knows progress records; nothing of models.
"""

from __future__ import annotations

from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kvthrift.eval.runner import Progress

EVERY = 30.0  # seconds between lines
SPEED_OVER = 3600.0  # seconds of work that the time left is judged by


class GridBar:
    """Use as a context; :meth:`tell` is what a runner calls."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]rows"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            speed_estimate_period=SPEED_OVER,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("Beginning", total=None)
        self._began = self._said = monotonic()
        self._fresh = 0  # rows of this start

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """Show how far a run is."""
        row = progress.row
        label = "Going on" if row is None else f"{row['task']}, {row['arm']}"
        self._fresh += row is not None
        if row is None:  # there already: no measure of speed
            self._bar.reset(self._task, total=progress.total, completed=progress.done, description=label)
        else:
            self._bar.update(self._task, total=progress.total, completed=progress.done, description=label)
        now = monotonic()
        if not self._console.is_terminal and row is not None and now - self._said >= EVERY:
            self._said = now
            left = (now - self._began) / self._fresh * (progress.total - progress.done)
            self._console.print(
                f"{progress.done} of {progress.total} rows; {label}; about {left / 60:.0f} min left", soft_wrap=True
            )
