"""The page of a search that is under way: written again as trials come, for a browser that looks again."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from rich.console import Console

from kvthrift.errors import KvthriftError, MissingPackageError
from kvthrift.tune.report import RELOAD, html, read_study
from kvthrift.tune.search import Progress
from kvthrift.tune.study import write_whole

PAGE = "page.html"


class LivePage:
    """``page.html`` of a study's folder; without the packages that make pages there is none, said once."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self._written = -float(RELOAD)
        self._off = False

    def tell(self, progress: Progress) -> None:
        """What a search calls after every trial; writes no more often than a browser looks."""
        if monotonic() - self._written >= RELOAD:
            self._write(live=True)

    def finish(self) -> None:
        """The page as it stays."""
        self._write(live=False)

    def _write(self, *, live: bool) -> None:
        if self._off:
            return
        try:
            write_whole(self._folder / PAGE, html([read_study(self._folder)], live=live))
        except MissingPackageError as error:
            self._console.print(f"note: {error}", soft_wrap=True, highlight=False)
            self._off = True
        except KvthriftError:  # nothing to show yet; a page must not end a search
            return
        if self._written < 0:
            self._console.print(f"watch it in a browser: {self._folder / PAGE}", soft_wrap=True, highlight=False)
        self._written = monotonic()
