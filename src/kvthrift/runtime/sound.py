"""Whether the keys that entries were chosen by are finite; a GPU tells it late, and is not waited for.

A key that is not makes every score of its head meaningless, so that whatever stayed would be arbitrary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvthrift.errors import CacheStateError


class Soundness:
    """Sums of keys, by layer, none of which may be infinite or NaN."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, Tensor]] = []
        self._sent: list[tuple[list[int], Tensor, torch.cuda.Event]] = []

    def note(self, number: int, keys: Tensor) -> None:
        """Look at the keys ``[B, H, T, D]`` of a layer, finite where there is no entry.

        Args:
            number: the model's own number of the layer.

        Raises:
            CacheStateError: they are not finite; of keys on a GPU that is said by a later :meth:`check`.
        """
        total = keys.sum(dtype=torch.float32)
        if keys.device.type == "cuda":
            self._noted.append((number, total))
        elif not math.isfinite(float(total)):
            _refuse([number])

    def fork(self) -> Soundness:
        """Another one that knows the same."""
        other = Soundness()
        other._noted, other._sent = [*self._noted], [*self._sent]
        return other

    def send(self) -> None:
        """Have what was noted brought to the host in its time."""
        if not self._noted:
            return
        numbers, totals = zip(*self._noted, strict=True)
        device = totals[-1].device
        there = torch.stack([total.to(device) for total in totals])
        host = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        self._noted, self._sent = [], [*self._sent, (list(numbers), host, event)]

    def check(self) -> None:
        """Say what has arrived.

        Raises:
            CacheStateError: keys of some layers were not finite.
        """
        waiting = []
        for numbers, host, event in self._sent:
            if not event.query():  # type: ignore[no-untyped-call]
                waiting.append((numbers, host, event))
            elif not bool(host.isfinite().all()):
                _refuse([n for n, good in zip(numbers, host.isfinite().tolist(), strict=True) if not good])
        self._sent = waiting


def _refuse(numbers: list[int]) -> None:
    layers = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {', '.join(map(str, numbers))}"
    raise CacheStateError(
        f"keys of {layers} are infinite or not a number, so nothing can be said of which entries matter, and the "
        "model's answers from there on mean nothing either. Look for the cause in the model or its dtype; then call "
        "reset() and start again, or go on from a fork made before."
    )
