"""Tokens in and out of the blocks of vLLM's CPU kernels, head by head.

A block ``[H, size, 2D]`` is H pages of one head; page ``block * H + head``. Imported only inside vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from kvthrift.integrations.vllm.cells import cells_of

_BITS = 3  # of a number that even fp8 holds exactly


def kernel_of(layer: Any) -> str:
    """Which of vLLM's CPU kernels a layer uses; until 0.28 only its implementation knew."""
    return str(layer.isa if hasattr(layer, "isa") else layer.impl.isa)


class Pages:
    """One layer's cache as pages of one head.

    Attributes:
        heads, size: KV heads, and tokens a page.
    """

    _orders: ClassVar[dict[Any, list[tuple[Tensor, Tensor]]]] = {}

    def __init__(self, layer: Any, cache: Tensor, name: str, dtype: torch.dtype) -> None:
        blocks, self.heads, self.size, double = cache.shape
        self._dim, self._layer, self._name, self._dtype = double // 2, layer, name, dtype
        self._form = cells_of(name, layer._k_scale_float, layer._v_scale_float, dtype)
        self._parts = cache.view(blocks * self.heads, 1, self.size * 2, self._dim).chunk(2, dim=2)

    def of(self, blocks: Tensor) -> list[Tensor]:
        """Pages of each head in ``blocks``."""
        return [blocks * self.heads + head for head in range(self.heads)]

    def shared_out(self, blocks: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """All pages of ``blocks``, as many for each head as ``counts`` says."""
        pages = (blocks[:, None] * self.heads + torch.arange(self.heads)).flatten()
        return list(torch.split(pages, list(counts)))

    def no_queries(self, heads: int) -> Tensor:
        """Queries ``[0, HG, D]`` of nobody."""
        return torch.empty(0, heads, self._dim, dtype=self._dtype)

    def read(self, pages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[n, D]`` in the pages of each head, in order."""
        counts = [len(head) * self.size for head in pages]
        keys, values = (list(torch.split(part, counts)) for part in self._form.read(*self._cells(pages)))
        return keys, values

    def move(self, pages: Sequence[Tensor], kept: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """See :class:`kvthrift.integrations.vllm.moves.HeadPages`."""
        begins = accumulate((len(own) * self.size for own in pages[:-1]), initial=0)
        chosen = torch.cat([begin + places for begin, places in zip(begins, kept, strict=True)])
        there = torch.cat(list(target))
        for part, cells, (_, back) in zip(self._parts, self._cells(pages), self._order(), strict=True):
            rows = cells[chosen].view(len(there), self.size * self._dim)
            part[there] = rows[:, back].view(len(there), *part.shape[1:])

    def _cells(self, pages: Sequence[Tensor]) -> list[Tensor]:
        """Cells ``[n, D]`` of keys and of values in the pages of all heads, in order."""
        wanted = torch.cat(list(pages))
        parts = zip(self._parts, self._order(), strict=True)
        return [part[wanted].flatten(1)[:, places].view(-1, self._dim) for part, (places, _) in parts]

    def _order(self) -> list[tuple[Tensor, Tensor]]:
        """Where in a page the kernels of this machine put each number of keys and of values, and the way back.

        Learnt by storing numbered tokens, a few bits at a time.
        """
        kind = self._parts[0].dtype
        known = (kernel_of(self._layer), self.size, self._dim, self._dtype, self._name)
        if known not in self._orders:
            page = torch.zeros(1, 1, 2 * self.size, self._dim, dtype=kind)
            parts = page.chunk(2, dim=2)
            numbers = torch.arange(self.size * self._dim).view(self.size, 1, self._dim)
            found = [torch.zeros(numbers.numel(), dtype=torch.long) for _ in parts]
            form = cells_of(self._name, 1.0, 1.0, torch.float32)
            for shift in range(0, numbers.numel().bit_length(), _BITS):
                x = (numbers >> shift & (1 << _BITS) - 1).to(self._dtype)
                self._store(x, parts)
                for places, said in zip(found, form.read(*(part.reshape(1, -1) for part in parts)), strict=True):
                    places += said[0].long() << shift
            self._orders[known] = [(places.argsort(), places) for places in found]
        return self._orders[known]

    def _store(self, numbers: Tensor, parts: Sequence[Tensor]) -> None:
        """Let the kernel write the tokens ``[size, 1, D]`` of a page, as keys and as values."""
        slots = torch.arange(self.size)
        ops.cpu_attn_reshape_and_cache(
            numbers, numbers, *parts, slots, kernel_of(self._layer), k_scale=1.0, v_scale=1.0, kv_cache_dtype=self._name
        )
