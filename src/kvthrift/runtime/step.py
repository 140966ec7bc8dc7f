"""One forward pass: which of its columns are real tokens, and how padded rows are packed to the left.

Packed rows turn a padded batch into the causal problem it is: padding then stands behind every real token, where no
real query looks. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.errors import MaskError
from kvthrift.store import on_device

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Step:
    """The columns of one forward pass.

    Attributes:
        length: columns, padding included.
        counts: ``[B]`` real tokens of each sequence.
        start: ``[B]`` tokens each sequence had before.
        order: ``[B, length]`` columns with the real ones first, or None where all are real.
        columns: ``[B, length]`` bool on the host, which columns are real, or None where all are.
        at: ``[B, length]`` int64 true positions, where only the device knows them.
        shared: what layers need alike and only the first computes, by name.
    """

    length: int
    counts: Ints
    start: Ints
    order: Tensor | None
    device: torch.device
    columns: Bools | None = None
    at: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, name: Any, make: Callable[[], _T]) -> _T:
        """What ``make`` gives, made for the first layer that asks for it under this name."""
        if name not in self.shared:
            self.shared[name] = make()
        found: _T = self.shared[name]
        return found

    @property
    def padded(self) -> bool:
        """Whether some columns are padding."""
        return self.order is not None

    @cached_property
    def positions(self) -> Tensor:
        """``[B, length]`` int64 true positions of the packed columns."""
        if self.at is not None:
            return self.at
        start = on_device(self.start, self.device)
        return start[:, None] + torch.arange(self.length, device=self.device)

    @cached_property
    def seen(self) -> Tensor:
        """``[B]`` int64 tokens of each sequence after this pass."""
        return on_device(self.start + self.counts, self.device)

    @cached_property
    def real(self) -> Tensor:
        """``[B, length]`` bool: which packed columns are real."""
        counts = on_device(self.counts, self.device)
        return torch.arange(self.length, device=self.device) < counts[:, None]

    def pack(self, x: Tensor) -> Tensor:
        """Columns of ``x [B, N, length, D]`` with the real ones first."""
        if self.order is None:
            return x
        return x.gather(2, self.order[:, None, :, None].expand(x.shape))

    def unpack(self, x: Tensor) -> Tensor:
        """Undo :meth:`pack`; padding gets zeros."""
        if self.order is None:
            return x
        x = x.masked_fill(~self.real[:, None, :, None], 0.0)
        return torch.empty_like(x).scatter_(2, self.order[:, None, :, None].expand(x.shape), x)


class Columns:
    """Which columns of a batch were real tokens, from the first forward pass on.

    ``history [B, N]`` is None as long as every column was real.
    """

    def __init__(self) -> None:
        self.length = 0
        self.history: Bools | None = None

    @property
    def padded(self) -> bool:
        """Whether any column so far was padding."""
        return self.history is not None

    def seen(self, batch: int) -> Ints:
        """``[B]`` real tokens so far."""
        if self.history is None:
            return np.full(batch, self.length, dtype=np.int64)
        return np.asarray(self.history.sum(axis=1), dtype=np.int64)

    def step(self, batch: int, length: int, mask: Tensor | None, device: torch.device) -> Step:
        """Read the next ``length`` columns from a padding mask ``[B, past + length]`` bool, or None: all are real.

        Raises:
            MaskError: the mask has another shape, or disagrees with what earlier passes said of their columns.
        """
        start = self.seen(batch)
        if mask is None:
            if self.history is not None:
                raise MaskError(
                    "this cache holds padded sequences, but the forward pass came without an attention mask, so real "
                    "tokens and padding cannot be told apart. Pass attention_mask for all columns, old and new."
                )
            return Step(length, np.full(batch, length, dtype=np.int64), start, None, device)
        given = mask.to("cpu", torch.bool).numpy()
        if given.shape != (batch, self.length + length):
            raise MaskError(
                f"the padding mask has shape {given.shape}, but {batch} sequences of {self.length} cached and {length} "
                f"new columns need {(batch, self.length + length)}."
            )
        past, new = given[:, : self.length], given[:, self.length :]
        known = np.ones_like(past) if self.history is None else self.history
        if not np.array_equal(past, known):
            raise MaskError(
                "the padding mask says otherwise of cached columns than it did when they were read, so they cannot be "
                "trusted. Keep the mask of earlier columns as it was."
            )
        if new.all():
            return Step(length, np.full(batch, length, dtype=np.int64), start, None, device)
        order = on_device(np.argsort(~new, axis=1, kind="stable"), device)
        return Step(length, new.sum(axis=1).astype(np.int64), start, order, device, new)

    def advance(self, step: Step) -> None:
        """Remember the columns of a pass."""
        batch = len(step.counts)
        if self.history is None and not step.padded:
            self.length += step.length
            return
        new = np.ones((batch, step.length), dtype=bool) if step.columns is None else step.columns
        past = np.ones((batch, self.length), dtype=bool) if self.history is None else self.history
        self.history = np.concatenate((past, new), axis=1)
        self.length += step.length

    def grow(self, batch: int, length: int) -> None:
        """Remember ``length`` columns in which every sequence had a real token."""
        if self.history is not None:
            self.history = np.concatenate((self.history, np.ones((batch, length), dtype=bool)), axis=1)
        self.length += length

    def crop(self, length: int) -> None:
        """Forget all columns from ``length`` on."""
        self.length = length
        if self.history is not None:
            self._remember(self.history[:, :length])

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows`` of the present ones."""
        if self.history is not None:
            self._remember(self.history[rows])

    def _remember(self, history: Bools) -> None:
        """Once no padding is left, masks need not be passed any more."""
        self.history = None if history.all() else history

    def fork(self) -> Columns:
        """An independent copy."""
        other = Columns()
        other.length, other.history = self.length, None if self.history is None else self.history.copy()
        return other
