"""What each head keeps of a request is moved into the last of its full blocks, whichever kernels read them later.

Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvthrift.integrations.vllm.books import Book
from kvthrift.integrations.vllm.compact import kept_entries, request_view
from kvthrift.integrations.vllm.plan import Plan
from kvthrift.integrations.vllm.settings import Settings


class HeadPages(Protocol):
    """One layer's cache as pages of one head.

    Attributes:
        heads, size: KV heads, and tokens a page.
    """

    heads: int
    size: int

    def of(self, blocks: Tensor) -> list[Tensor]:
        """Pages of each head in ``blocks``."""

    def shared_out(self, blocks: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """All pages of ``blocks``, as many for each head as ``counts`` says."""

    def read(self, pages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[n, D]`` in the pages of each head, in order."""

    def move(self, pages: Sequence[Tensor], kept: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Fill the ``target`` pages of each head with some of what is in its ``pages``, bit by bit.

        Args:
            pages: of each head.
            kept: ``[n_h]`` the places of its tokens in them, in order.
            target: of each head, with room for exactly as many; they may be among ``pages``.
        """


def compact(
    settings: Settings,
    pages: HeadPages,
    own: Tensor,
    found: Plan,
    book: Book,
    queries: Tensor,
    *,
    layer: int,
    scale: float,
) -> None:
    """Choose what stays of a request on a layer, move it, and note where each head's lies.

    Args:
        settings: of the server.
        pages: the layer's cache.
        own: the request's blocks, from its first token on.
        found: what becomes of them.
        book: of the request; brought up to date.
        queries: ``[n, HG, D]`` of the last tokens before ``found.at``; none for scorers that ask for none.
        layer: index of the layer.
        scale: softmax scale.
    """
    recipe, size, heads = settings.recipe, pages.size, pages.heads
    behind = own[book.full : -(-found.at // size)]
    before = book.pages or pages.of(own[book.dropped : book.full])
    source = [torch.cat(both) for both in zip(before, pages.of(behind), strict=True)]
    keys, values = pages.read(source)
    positions = book.positions_of(heads, size, found.at, own.device)
    lengths = [len(head) for head in positions]
    keys, values = ([head[:n] for head, n in zip(part, lengths, strict=True)] for part in (keys, values))
    view = request_view(
        keys,
        values,
        positions,
        queries.transpose(0, 1),
        seen=found.at,
        scale=scale,
        layer=layer,
        layers=settings.layers,
    )
    kept = kept_entries(recipe, view, block=size, kept=found.kept)
    there = own[found.dropped : found.full]
    counts = [len(head) // size for head in kept]
    target = pages.of(there) if recipe.heads.uniform else pages.shared_out(there, counts)
    pages.move(source, kept, target)
    book.full, book.dropped = found.full, found.dropped
    book.pages = [] if recipe.heads.uniform else target
    if settings.follows or settings.check:
        book.positions = [head[chosen].int() for head, chosen in zip(positions, kept, strict=True)]
