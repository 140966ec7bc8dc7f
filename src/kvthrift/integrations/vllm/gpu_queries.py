"""Queries of single tokens, where a CUDA graph leaves them: no Python runs while one is replayed.

One copy for each layer is part of every graph. Before the next step the newest query of each request is taken from
there, or put into a ring of the last ``window`` ones. Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvthrift.store import on_device


class Queries:
    """The last step's, and rings of those before it, of all layers.

    Attributes:
        window: queries that a scorer asks for.
        last: ``[L, rows, HG, D]``, by the row of the step.
        ring: ``[L, slots, window, HG, D]``, by position modulo ``window``; None where answers are not compressed.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        window: int,
        heads: int,
        dim: int,
        *,
        slots: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.window = window
        self.last = torch.zeros(layers, rows, heads, dim, dtype=dtype, device=device)
        self.ring: Tensor | None = None
        if slots:
            self.ring = torch.zeros(layers, slots, window, heads, dim, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.last, self.ring) if t is not None)

    def keep(self, layer: int, queries: Tensor) -> None:
        """Note the queries ``[n, HG, D]`` of n rows with one token each; fit for a graph."""
        there = min(len(queries), self.last.shape[1])
        self.last[layer, :there].copy_(queries[:there])

    def keep_rows(self, layer: int, rows: Tensor, queries: Tensor) -> None:
        """Note the queries ``[n, HG, D]`` of some ``rows [n]``."""
        self.last[layer].index_copy_(0, rows, queries)

    def turn(self, layers: Sequence[int], rows: Sequence[int], slots: Sequence[int], places: Sequence[int]) -> None:
        """Put what the last step noted of ``rows`` into the rings of ``slots``, each at the place of its position."""
        assert self.ring is not None
        given = (np.array(each, dtype=np.int64) for each in (layers, rows, slots, places))
        layer, row, slot, place = (on_device(each, self.last.device) for each in given)
        self.ring[layer[:, None], slot, place % self.window] = self.last[layer[:, None], row]

    def fill(self, layer: int, slot: int, end: int, queries: Tensor) -> None:
        """Put the queries ``[n, HG, D]`` of the tokens before ``end``, at most ``window``, into a ring."""
        assert self.ring is not None
        places = torch.arange(end - len(queries), end, device=queries.device) % self.window
        self.ring[layer, slot].index_copy_(0, places, queries)

    def between(self, layer: int, slot: int, begin: int, end: int) -> Tensor:
        """Queries ``[n, HG, D]`` of the tokens ``begin .. end - 1``, which must be among the last ``window``."""
        assert self.ring is not None
        places = torch.arange(begin, end, device=self.ring.device) % self.window
        return self.ring[layer, slot].index_select(0, places)
