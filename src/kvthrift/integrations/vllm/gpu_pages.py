"""Tokens in and out of the blocks of vLLM's GPU kernels, head by head.

A block ``[H, size, 2D]`` is H pages of one head, keys beside values; page ``block * step + head``. Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvthrift.errors import UnsupportedModelError


class Pages:
    """One layer's cache as pages of one head.

    Attributes:
        heads, size: KV heads, and tokens a page.
        step: pages from one block to the next; other layers' may lie between them.
        keys, values: ``[P, size, 1, D]``, as attention kernels take pages of one head.
    """

    def __init__(self, cache: Tensor) -> None:
        blocks, self.heads, self.size, double = cache.shape
        page, (block, head, token, number) = self.size * double, cache.stride()
        if (head, token, number) != (page, double, 1) or block % page:
            raise UnsupportedModelError(
                f"the KV cache has strides {cache.stride()}: a block is not one page after another of each head, which "
                "kvthrift needs. Unset VLLM_KV_CACHE_LAYOUT, or set it to HND."
            )
        self.step, dim = block // page, double // 2
        self._cache = (cache.data_ptr(), cache.shape, cache.stride())
        shape, strides = ((blocks - 1) * self.step + self.heads, self.size, 1, dim), (page, double, dim, 1)
        self.keys = cache.as_strided(shape, strides)
        self.values = cache.as_strided(shape, strides, cache.storage_offset() + dim)

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

    def read(self, pages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[n, D]`` in the pages of each head, in order."""
        wanted, counts = torch.cat(list(pages)), [len(head) * self.size for head in pages]
        keys, values = (list(torch.split(part[wanted].flatten(0, 2), counts)) for part in (self.keys, self.values))
        return keys, values

    def write(self, pages: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Fill the pages of each head with its tokens ``[n, D]``."""
        target = torch.cat(list(pages))
        for part, given in ((self.keys, keys), (self.values, values)):
            part[target] = torch.cat(list(given)).view(len(target), self.size, 1, -1)
