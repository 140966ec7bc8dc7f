"""Progress bars on stderr for loading, reading and decoding. Knows nothing of what is measured meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel


class Bars:
    """A group of bars that vanishes when it is left; silent unless ``shown`` and stderr is a terminal."""

    def __init__(self, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[unit]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
            disable=not (shown and console.is_terminal),
        )
        self._stages: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, fraction: float) -> None:
        """Move the bar of a stage, making it on the first call."""
        if name not in self._stages:
            self._stages[name] = self._progress.add_task(name, total=100, unit="%")
        self._progress.update(self._stages[name], completed=round(100 * fraction))

    @contextmanager
    def reading(self, label: str, model: PreTrainedModel, passes: int) -> Iterator[None]:
        """A bar that moves whenever a decoder layer is through, for ``passes`` forward passes."""
        layers = getattr(model.get_decoder(), "layers", ())
        task = self._progress.add_task(label, total=len(layers) * passes or None, unit="layers")

        def through(*_: Any) -> None:
            self._progress.advance(task)

        hooks = [layer.register_forward_hook(through) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def decoding(self, label: str, tokens: int) -> Iterator[Callable[[], None]]:
        """A bar that its caller moves token by token; an early end fills it."""
        task = self._progress.add_task(label, total=tokens, unit="tokens")
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            self._progress.advance(task)

        yield tick
        self._progress.update(task, total=count)
