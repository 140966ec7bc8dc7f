"""Outputs of heads that a recipe gives up, taken from the heads that stand in for them (2410.03090).

What stands in for what is read off the entries that are held, so that forks, beams and saved caches need to carry
nothing along; it is looked up again only where pages have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.allocate import DeletedHeads
from kvthrift.allocate.deleted import stand_ins

if TYPE_CHECKING:
    from kvthrift.runtime import LayerCache
    from kvthrift.store.layer import LayerStore, Lengths


class StandIns:
    """Who stands in for whom in one layer, as long as its pages are the same.

    Args:
        heads: the recipe's allocator, which says whom it gives up.
        sinks: leading tokens that every head keeps: heads are not compared by them.
    """

    def __init__(self, heads: DeletedHeads, sinks: int) -> None:
        self.heads, self.sinks = heads, sinks
        self._seen: tuple[object, Lengths] | None = None  # pages and lengths that the map was made from
        self._map: Tensor | None = None

    def of(self, layer: LayerCache) -> Tensor | None:
        """The head whose output stands for each head's, ``[B, H]`` int64; None where each has its own."""
        store = layer.store
        if store is None or not store.longest or layer.whole:
            return None
        if self._seen is None or not _grown(store, *self._seen):
            self._map = self._find(store, layer.number)
            self._seen = (store.table, store.lengths.copy())
        return self._map

    def _find(self, store: LayerStore, number: int) -> Tensor | None:
        given_up = torch.tensor(self.heads.given_up(number, store.shape.kv_heads), device=store.device)
        positions, valid, view = store.positions(), store.valid(), store.read()
        last = positions.masked_fill(~valid, -1).amax(dim=-1)  # [B, H]
        gone = given_up & (valid.sum(dim=-1) <= last)  # something of it was dropped
        if not bool(gone.any()):
            return None
        first = gone.long().argmax(dim=1)[:, None]  # a head that is given up, if there is one; all hold the same
        known = positions.take_along_dim(first[..., None], dim=1)[:, 0]
        order = (known < self.sinks) | ~valid.take_along_dim(first[..., None], dim=1)[:, 0]
        at = order.long().argsort(dim=1, stable=True)[:, : self.heads.protected]
        wanted = known.gather(1, at).masked_fill(order.gather(1, at), -1)  # [B, W] positions
        match = (positions[:, :, None] == wanted[:, None, :, None]) & valid[:, :, None]  # [B, H, W, T]
        place = match.long().argmax(dim=-1)[..., None].expand(-1, -1, -1, view.keys.shape[-1])
        keys = view.keys.gather(2, place).masked_fill(~match.any(dim=-1)[..., None], 0.0)
        return stand_ins(keys, gone)


def _grown(store: LayerStore, table: object, lengths: Lengths) -> bool:
    """Whether all that has happened since is that every head took in as many tokens."""
    if store.table is not table or store.lengths.shape != lengths.shape:
        return False
    more = store.lengths - lengths
    return bool((more >= 0).all() and (more == more[:, :1]).all())


def taken_over(out: Tensor, owners: Tensor | None) -> Tensor:
    """``out [B, HG, Q, D]`` with the query heads of each KV head replaced by those of ``owners [B, H]``."""
    if owners is None:
        return out
    group = out.shape[1] // owners.shape[1]
    heads = (owners[..., None] * group + torch.arange(group, device=out.device)).flatten(1)
    return out.gather(1, heads[..., None, None].expand(out.shape))
