"""Tokens in and out of the blocks of vLLM's CPU kernels, head by head.

A block ``[H, size, 2D]`` is H pages of one head; page ``block * H + head``. Imported only inside vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops

_DIGIT = 128  # numbers that even bfloat16 holds exactly


class Pages:
    """One layer's cache as pages of one head.

    Attributes:
        heads, size: KV heads, and tokens a page.
    """

    _orders: ClassVar[dict[Any, tuple[Tensor, Tensor]]] = {}

    def __init__(self, layer: Any, cache: Tensor, dtype: str) -> None:
        blocks, self.heads, self.size, double = cache.shape
        self._dim, self._layer, self._dtype = double // 2, layer, dtype
        parts = cache.view(blocks * self.heads, 1, self.size * 2, self._dim).chunk(2, dim=2)
        self._keys, self._values = parts

    def of(self, blocks: Tensor) -> list[Tensor]:
        """Pages of each head in ``blocks``."""
        return [blocks * self.heads + head for head in range(self.heads)]

    def shared_out(self, blocks: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """All pages of ``blocks``, as many for each head as ``counts`` says."""
        pages = (blocks[:, None] * self.heads + torch.arange(self.heads)).flatten()
        return list(torch.split(pages, list(counts)))

    def no_queries(self, heads: int) -> Tensor:
        """Queries ``[0, HG, D]`` of nobody."""
        return self._keys.new_empty(0, heads, self._dim)

    def read(self, pages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[n, D]`` in the pages of each head, in order."""
        order = self._order(self._layer.isa, self.size, self._dim, self._keys.dtype)
        wanted, counts = torch.cat(list(pages)), [len(head) * self.size for head in pages]
        found = (
            part[wanted].flatten(1)[:, places].view(-1, self._dim)
            for part, places in zip((self._keys, self._values), order, strict=True)
        )
        keys, values = (list(torch.split(part, counts)) for part in found)
        return keys, values

    def write(self, pages: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Fill the pages of each head with its tokens ``[n, D]``."""
        slots = (torch.cat(list(pages))[:, None] * self.size + torch.arange(self.size)).flatten()
        ops.cpu_attn_reshape_and_cache(
            torch.cat(list(keys))[:, None].contiguous(),
            torch.cat(list(values))[:, None].contiguous(),
            self._keys,
            self._values,
            slots,
            self._layer.isa,
            k_scale=self._layer._k_scale_float,
            v_scale=self._layer._v_scale_float,
            kv_cache_dtype=self._dtype,
        )

    @classmethod
    def _order(cls, isa: Any, size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where in a page the kernels of this machine put each number: learnt by storing numbered tokens."""
        known = (isa, size, dim, dtype)
        if known not in cls._orders:
            page = torch.zeros(1, 1, 2 * size, dim, dtype=dtype)
            keys, values = page.chunk(2, dim=2)
            numbers, slots = torch.arange(size * dim).view(size, 1, dim), torch.arange(size)
            places: list[list[Tensor]] = [[], []]
            for digit in (numbers // _DIGIT, numbers % _DIGIT):
                x = digit.to(dtype)
                ops.cpu_attn_reshape_and_cache(x, x, keys, values, slots, isa)
                for found, part in zip(places, (keys, values), strict=True):
                    found.append(part.reshape(-1).long())
            cls._orders[known] = tuple((high * _DIGIT + low).argsort() for high, low in places)  # type: ignore[assignment]
        return cls._orders[known]
