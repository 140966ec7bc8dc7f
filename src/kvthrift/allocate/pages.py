"""Budgets in whole pages: what a page costs is the score of the last entry that has to go to free it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.allocate.joint import stack, unstack, winners
from kvthrift.allocate.share import share_out
from kvthrift.part import require

_NEVER = float("inf")


@dataclass(frozen=True)
class PageLayers(LayerAllocator, name="pages"):
    """The cheapest pages of the whole model are freed, whichever layer and head they are in (2410.00161).

    A head of n entries has ceil(n / ``page``) pages, the last with r of them. Freeing its j-th page (from 0) takes its
    r + j * page lowest scores, and costs the highest of those; pages that hold a protected entry are never freed. As
    many pages are freed, cheapest first, as there are more than the budget has; heads that free none keep their
    hanging entries. ``page`` should be the store's, or a multiple of it, for then all that is freed is memory.

    A budget that is no multiple of a page is rounded down, so that it is never exceeded (``rounding="up"`` is the
    published rule), and below one page the page is as small as the budget. ``empties`` lets a head lose all it has.
    ``even`` frees as many pages in every layer, or in every head, as far as there are any (what a whole division leaves
    over is freed in the lowest ones). ``ranked`` entries at most, or one head's, are sorted at a time, for the memory
    that sorting takes; nothing else depends on it.
    """

    page: int = 16
    rounding: Literal["down", "up"] = "down"
    empties: bool = False
    even: Literal["none", "layers", "heads"] = "none"
    ranked: int = 5_000_000
    scope: ClassVar[Literal["layer", "model", "joint"]] = "joint"
    gives_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.page >= 1, f"page={self.page} must be at least 1 entry.")
        require(self.ranked >= 1, f"ranked={self.ranked} must be at least 1 entry.")

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        table, heads = stack(contests), [x.shape[1] for x in contests]
        rows = [self._kept(x[None], int(n), heads) for x, n in zip(table, per_head.tolist(), strict=True)]
        return unstack(torch.cat(rows), contests)

    def _kept(self, table: Tensor, per_head: int, heads: list[int]) -> Tensor:
        """Entries of each head of one sequence, ``[1, N, T] -> [1, N]``; layers have so many ``heads``."""
        page = min(self.page, max(per_head, 1))
        lengths = (table > -_NEVER).sum(dim=-1)  # [1, N]
        pages = -(-lengths // page)
        allowed = (per_head if self.rounding == "down" else per_head + page - 1) // page * table.shape[1]
        costs = self._costs(table, lengths, page)  # [1, N, P]
        if not self.empties:
            last = torch.arange(costs.shape[-1], device=table.device) >= pages[..., None] - 1
            costs = costs.masked_fill(last, _NEVER)
        freed = self._freed(costs, int(pages.sum()) - allowed, heads)
        gone = lengths - (pages - 1) * page + (freed - 1) * page
        return lengths - torch.where(freed > 0, gone, 0)

    def _costs(self, table: Tensor, lengths: Tensor, page: int) -> Tensor:
        """:func:`page_costs`, so many heads at a time that no more entries are sorted than may be."""
        step = max(self.ranked // max(table.shape[-1], 1), 1)
        parts = [
            page_costs(table[:, n : n + step], lengths[:, n : n + step], page) for n in range(0, table.shape[1], step)
        ]
        return torch.cat(parts, dim=1)

    def _freed(self, costs: Tensor, wanted: int, heads: list[int]) -> Tensor:
        """Pages that each head frees, ``[1, N]``, of ``wanted`` in all."""
        sizes = {"none": [costs.shape[1]], "layers": heads, "heads": [1] * costs.shape[1]}[self.even]
        groups = torch.split(costs, sizes, dim=1)
        finite = np.array([int((x < _NEVER).sum()) for x in groups], dtype=np.int64)
        shares = share_out(max(wanted, 0), np.ones(len(groups)), finite)
        rooms = torch.from_numpy(shares).to(costs.device)
        return torch.cat([winners(-x, rooms[n : n + 1]) for n, x in enumerate(groups)], dim=1)


def page_costs(table: Tensor, lengths: Tensor, page: int) -> Tensor:
    """What freeing each head's j-th page costs, ``[B, N, P]``, never falling along P; ``inf`` where it cannot be freed.

    Args:
        table: ``[B, N, T]`` scores, ``inf`` for protected entries, ``-inf`` where there is none.
        lengths: ``[B, N]`` entries of each head.
        page: entries of a page.
    """
    ascending = table.masked_fill(table == -_NEVER, _NEVER).sort(dim=-1).values
    steps = torch.arange(-(-table.shape[-1] // page), device=table.device)
    hanging = lengths - (-(-lengths // page) - 1) * page  # 1 .. page of the last page; no matter where there is none
    places = hanging[..., None] + steps * page - 1
    costs = ascending.gather(-1, places.clamp(0, table.shape[-1] - 1))
    return costs.masked_fill(places >= lengths[..., None], _NEVER)
