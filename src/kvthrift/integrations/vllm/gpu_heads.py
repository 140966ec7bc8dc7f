"""Heads of unequal lengths on a GPU: every head of every request is a sequence of its own to vLLM's kernels.

Tables are put together on the device, layer by layer, right before attention reads them, so that a CUDA graph does it
too. Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.integrations.vllm.cells import pick
from kvthrift.integrations.vllm.gpu_ledger import Entry
from kvthrift.kernels.head_tables import Kept, head_tables
from kvthrift.store import on_device

Places = NDArray[np.int64] | NDArray[np.int32]


class Store:
    """Where the heads of every request keep what they keep, on each layer of a group.

    Args:
        layers: of the group.
        slots: the most requests at a time; one more stands for rows that nobody asked for.
        room: the most blocks that a request keeps of its full ones.
        heads, size, step: KV heads, tokens a page, and pages from one block to the next.
    """

    def __init__(
        self, layers: int, slots: int, room: int, heads: int, size: int, step: int, device: torch.device
    ) -> None:
        self.heads, self.size, self.nobody = heads, size, slots
        self._pages = torch.zeros(layers, slots + 1, room * heads, dtype=torch.int32, device=device)
        self._starts = torch.zeros(layers, slots + 1, heads + 1, dtype=torch.int32, device=device)
        self._full = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.kept = [Kept(self._pages[i], self._starts[i], self._full, size, step) for i in range(layers)]

    def open(self, slot: int) -> None:
        """A request of which nothing was given back yet takes a slot."""
        self._full[slot] = 0
        self._starts[:, slot] = 0

    def put(self, number: int, entry: Entry) -> int:
        """Take over what a request's heads keep on layer ``number``; says the pages of the longest."""
        book = entry.books[number]
        counts = [len(pages) for pages in book.pages]
        starts = np.cumsum([0, *counts], dtype=np.int32)
        self._starts[number, entry.slot] = on_device(starts, self._starts.device)
        self._pages[number, entry.slot, : sum(counts)] = torch.cat(book.pages).int()
        return max(counts)

    def cover(self, slot: int, full: int) -> None:
        """Note the blocks that those stand for."""
        self._full[slot] = full


@dataclass
class HeadStep:
    """A step as its kernels see it: ``R * H`` sequences with one KV head each.

    Attributes:
        store: of the group.
        slots, lengths: ``[R]`` int32; of each request its slot and its tokens.
        blocks: ``[R, *]`` int32.
        tables, sizes: ``[R * H, width]`` and ``[R * H]`` int32, filled anew on every layer.
        starts: ``[R * H + 1]`` int32, where the queries of each begin.
        places: ``[T * H]`` where those queries are among a step's tokens, head by head; None where each token is a
            request, so that they lie in that order anyway.
        tokens: T, padding included.
        most: the most queries that a request has.
        longest: the most entries that a head has.
    """

    store: Store
    slots: Tensor
    lengths: Tensor
    blocks: Tensor
    tables: Tensor
    sizes: Tensor
    starts: Tensor
    places: Tensor | None
    tokens: int
    most: int
    longest: int

    def fill(self, number: int) -> None:
        """Put the tables of a layer of the group together."""
        head_tables(self.store.kept[number], self.slots, self.lengths, self.blocks, self.tables, self.sizes)

    def split(self, query: Tensor) -> Tensor:
        """Queries ``[>= T, HG, D]`` as ``[T * H, G, D]``, sequence by sequence."""
        heads = query[: self.tokens].reshape(self.tokens * self.store.heads, -1, query.shape[-1])
        return heads if self.places is None else pick(heads, self.places)

    def target(self, asked: Tensor, output: Tensor) -> Tensor:
        """Where a kernel writes what it found for those; in ``output [>= T, HG, D]`` itself if it can."""
        if self.places is None:
            return output[: self.tokens].view(asked.shape)
        return torch.empty_like(asked, dtype=output.dtype)

    def join(self, found: Tensor, output: Tensor) -> None:
        """Write what was found to ``output [>= T, HG, D]``."""
        if self.places is not None:
            output[: self.tokens].view(found.shape).index_copy_(0, self.places, found)


def query_places(starts: Sequence[int], heads: int) -> tuple[Places, Places]:
    """Where the queries of each head of each request begin and lie, given where those of each request begin.

    Args:
        starts: ``R + 1`` numbers, the first of them 0.
        heads: H.

    Returns:
        ``[R * H + 1]`` int32 begins, and ``[T * H]`` int64 places among ``[T * H]``, tokens first.
    """
    first = np.array(starts, dtype=np.int64)
    news = np.diff(first)
    begins = np.concatenate(([0], np.repeat(news, heads).cumsum())).astype(np.int32)
    row = np.repeat(np.arange(len(news)), news)
    behind = first[row] * (heads - 1) + np.arange(len(row))
    places = np.empty(len(row) * heads, dtype=np.int64)
    places[(behind[:, None] + np.arange(heads) * news[row][:, None]).ravel()] = np.arange(len(places))
    return begins, places
