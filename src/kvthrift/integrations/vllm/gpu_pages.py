"""Tokens in and out of the blocks of vLLM's GPU kernels, head by head.

A block ``[H, size, 2C]`` is H pages of one head, a key's cell beside a value's; page ``block * step + head``. Knows no
vLLM class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.cells import PLAIN, Cells


class Pages:
    """One layer's cache as pages of one head.

    Attributes:
        heads, size: KV heads, and tokens a page.
        step: pages from one block to the next; other layers' may lie between them.
        dim: D, numbers of a key.
        keys, values: ``[P, size, 1, C]`` cells, as attention kernels take pages of one head.
    """

    def __init__(self, cache: Tensor, cells: Cells = PLAIN) -> None:
        blocks, self.heads, self.size, double = cache.shape
        page, (block, head, token, number) = self.size * double, cache.stride()
        if (head, token, number) != (page, double, 1) or block % page:
            raise UnsupportedModelError(
                f"the KV cache has strides {cache.stride()}: a block is not one page after another of each head, which "
                "kvthrift needs. Unset VLLM_KV_CACHE_LAYOUT, or set it to HND."
            )
        self.step, width = block // page, double // 2
        self.dim, self._form = cells.numbers(width), cells
        self._cache = (cache.data_ptr(), cache.shape, cache.stride())
        count = (blocks - 1) * self.step + self.heads
        self._cells = cache.as_strided((count, self.size, double), (page, double, 1))
        shape, strides = (count, self.size, 1, width), (page, double, width, 1)
        parts = (cache.as_strided(shape, strides, cache.storage_offset() + at) for at in (0, width))
        self.keys, self.values = (part if cells.kind is None else part.view(cells.kind) for part in parts)

    def of_cache(self, cache: Tensor) -> bool:
        """Whether these are the pages of that cache, which a server may have made anew."""
        return self._cache == (cache.data_ptr(), cache.shape, cache.stride())

    def of(self, blocks: Tensor) -> list[Tensor]:
        """Pages of each head in ``blocks``."""
        return [blocks * self.step + head for head in range(self.heads)]

    def shared_out(self, blocks: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """All pages of ``blocks``, as many for each head as ``counts`` says."""
        pages = (blocks[:, None] * self.step + torch.arange(self.heads, device=blocks.device)).flatten()
        return list(torch.split(pages, list(counts)))

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of keys and values ``[P, size, 1]`` float32, where each token of a head has its own."""
        count, size, double = self._cells.shape
        flat = self._cells.new_empty(0, dtype=torch.float32).set_(self._cells.untyped_storage())
        shape, strides = (count, size, 1), (size * double // 4, double // 4, 1)
        ends = (self._cells.storage_offset() + double // 2 * half - 4 for half in (1, 2))
        keys, values = (flat.as_strided(shape, strides, end // 4) for end in ends)
        return keys, values

    def no_queries(self, heads: int) -> Tensor:
        """Queries ``[0, HG, D]`` of nobody."""
        kind = self.keys.dtype if self._form.kind is None else self._form.dtype
        return self.keys.new_empty(0, heads, self.dim, dtype=kind)

    def read(self, pages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[n, D]`` in the pages of each head, in order."""
        wanted, counts = torch.cat(list(pages)), [len(head) * self.size for head in pages]
        halves = self._cells[wanted].flatten(0, 1).chunk(2, dim=1)
        keys, values = (list(torch.split(part, counts)) for part in self._form.read(*halves))
        return keys, values

    def move(self, pages: Sequence[Tensor], kept: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """See :class:`kvthrift.integrations.vllm.moves.HeadPages`."""
        page = torch.cat([own[places // self.size] for own, places in zip(pages, kept, strict=True)])
        found = self._cells[page, torch.cat(list(kept)) % self.size]
        there = torch.cat(list(target))
        self._cells[there] = found.view(len(there), self.size, -1)
