"""What was held at most, and how long compressing took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """Running figures of one cache.

    Attributes:
        peak: most bytes held at once: stores, observations, and the layer in flight as the model handed it over.
        compressions: how often a layer was compressed.
    """

    peak: int = 0
    compressions: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def saw(self, held: int) -> None:
        """Note that ``held`` bytes were alive."""
        self.peak = max(self.peak, held)

    @contextmanager
    def compressing(self, device: torch.device) -> Iterator[None]:
        """Time one layer's compression; on a GPU by events, without waiting for it."""
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            stop.record(stream)
            self._events.append((start, stop))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Seconds spent compressing so far."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        self._events.clear()
        return self._seconds
