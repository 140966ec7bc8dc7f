"""Page tables of heads of unequal lengths, put together on the device from what each request keeps.

A server's block ``[H, size, ...]`` is H pages of one head each: page ``block * step + head``. Every head of a
compressed request has pages of its own, and behind them those of the blocks that were filled since. Knows nothing of a
server.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.kernels.fit import launching, load
from kvthrift.kernels.paged import unfit


@dataclass(frozen=True)
class Kept:
    """What the requests of one layer keep, by slot.

    Attributes:
        pages: ``[S, room]`` int32, those of one head after those of another.
        starts: ``[S, H + 1]`` int32, where those of each head begin; all zero where nothing was dropped.
        full: ``[S]`` int32 blocks that they stand for.
        size: tokens a page.
        step: pages from one block to the next.
    """

    pages: Tensor
    starts: Tensor
    full: Tensor
    size: int
    step: int

    @property
    def heads(self) -> int:
        """H."""
        return self.starts.shape[1] - 1


def head_tables(kept: Kept, slots: Tensor, lengths: Tensor, blocks: Tensor, tables: Tensor, sizes: Tensor) -> None:
    """Fill the table and the length of every head of every request.

    Args:
        kept: of the layer.
        slots: ``[R]`` int32.
        lengths: ``[R]`` int32 tokens of each request; for one with none, only its lengths are written.
        blocks: ``[R, *]`` int32 blocks of each request, from its first token on.
        tables: ``[>= R * H, width]`` int32, written as far as there are pages.
        sizes: ``[>= R * H]`` int32, entries of each head, written.
    """
    if unfit(kept.pages.device, torch.float32, 16, 16, 64) is None:
        with launching(kept.pages.device):
            load("head_tables").fill(kept, slots, lengths, blocks, tables, sizes)
        return
    _fill(kept, slots, lengths, blocks, tables, sizes)


def _fill(kept: Kept, slots: Tensor, lengths: Tensor, blocks: Tensor, tables: Tensor, sizes: Tensor) -> None:
    """The naive twin."""
    heads, rows, own = kept.heads, len(slots), slots.long()
    starts, full = kept.starts[own].long(), kept.full[own].long()[:, None]  # [R, H + 1], [R, 1]
    counts = starts.diff(dim=1)
    entries = torch.where(lengths[:, None] > 0, (counts - full) * kept.size + lengths.long()[:, None], 0)  # [R, H]
    column = torch.arange(tables.shape[1], device=tables.device)
    places = (starts[:, :heads, None] + column).clamp_(max=kept.pages.shape[1] - 1)
    first = kept.pages[own].gather(1, places.flatten(1)).view(rows, heads, -1)
    places = (full[..., None] + column - counts[..., None]).clamp_(0, blocks.shape[1] - 1)
    behind = blocks[:, None].expand(-1, heads, -1).gather(2, places) * kept.step
    behind += torch.arange(heads, device=tables.device)[:, None]
    found = torch.where(column < counts[..., None], first, behind).to(torch.int32).flatten(0, 1)
    there = column < -(-entries // kept.size).flatten()[:, None]
    target = tables[: rows * heads]
    target.copy_(torch.where(there, found, target))
    sizes[: rows * heads] = entries.flatten().to(torch.int32)
