"""Budgets in whole pages: what a page costs is the score of the last entry that has to go to free it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.allocate.joint import stack, unstack, winners
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
    """

    page: int = 16
    rounding: Literal["down", "up"] = "down"
    empties: bool = False
    scope: ClassVar[Literal["layer", "model", "joint"]] = "joint"
    gives_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.page >= 1, f"page={self.page} must be at least 1 entry.")

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        table = stack(contests)
        rows = [self._kept(x[None], int(n)) for x, n in zip(table, per_head.tolist(), strict=True)]
        return unstack(torch.cat(rows), contests)

    def _kept(self, table: Tensor, per_head: int) -> Tensor:
        """Entries of each head of one sequence: ``[1, N, T] -> [1, N]``."""
        page = min(self.page, max(per_head, 1))
        lengths = (table > -_NEVER).sum(dim=-1)  # [1, N]
        pages = -(-lengths // page)
        allowed = (per_head if self.rounding == "down" else per_head + page - 1) // page * table.shape[1]
        costs = page_costs(table, lengths, page)  # [1, N, P]
        if not self.empties:
            last = torch.arange(costs.shape[-1], device=table.device) >= pages[..., None] - 1
            costs = costs.masked_fill(last, _NEVER)
        finite = (costs < _NEVER).sum(dim=(1, 2))
        freed = winners(-costs, torch.minimum((pages.sum(dim=1) - allowed).clamp(min=0), finite))
        gone = lengths - (pages - 1) * page + (freed - 1) * page
        return lengths - torch.where(freed > 0, gone, 0)


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
