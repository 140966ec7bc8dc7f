"""Budgets of bytes where heads or layers differ: what is held is whole pages, so that is what is shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvthrift.allocate.paged import PageRoom
from kvthrift.runtime.step import Ints
from kvthrift.store import LayerStore

if TYPE_CHECKING:
    from kvthrift.runtime.agree import Agreement
    from kvthrift.runtime.views import LayerViews


class BytePages:
    """The pages of the compression in flight; of no account where a budget is of entries."""

    def __init__(self) -> None:
        self._room: PageRoom | None = None

    def room(
        self, state: Agreement, layer: LayerViews, rooms: Ints, totals: Ints | Tensor | None = None
    ) -> PageRoom | None:
        """What the heads of a layer share; None where all hold the same, for then entries are whole pages already.

        Args:
            state: the cache.
            layer: layers come in their order.
            rooms: ``[B]`` entries per head, the mean over layers.
            totals: ``[B]`` those of this layer, if they are known.
        """
        recipe, store = state.recipe, layer.store
        if store is None or not self.differ(state):
            return None
        heads, least = store.shape.kv_heads, recipe.protect.entries
        if recipe.layers.scope == "model" and totals is not None and not isinstance(totals, Tensor):
            return PageRoom(totals * heads, 1, state.page, least)  # it is cut again, to what it is granted then
        if recipe.reuse > 1:
            return PageRoom(rooms * heads, 1, state.page, least)  # the layers that copy it hold as much
        if layer.index == 0 or self._room is None:
            self._room = PageRoom(rooms * heads * state.layer_count, state.layer_count, state.page, least)
        return self._room

    def differ(self, state: Agreement) -> bool:
        """Whether bytes are shared out page by page: heads or layers may hold unequal numbers of them."""
        recipe = state.recipe
        return _of_bytes(state) and not (recipe.layers.name == "uniform" and recipe.heads.uniform)

    def floor(self, state: Agreement) -> int:
        """Entries per head that a layer must be given for every head to have the pages it needs."""
        return -(-max(state.recipe.protect.entries, 1) // state.page) * state.page if _of_bytes(state) else 0

    def overdue(self, state: Agreement, store: LayerStore, per_head: Ints) -> Ints:
        """Entries that each sequence of a layer holds beyond so many a head, ``[B]``; of bytes, those of its pages."""
        granted = per_head * store.shape.kv_heads
        if not _of_bytes(state):
            return np.asarray((store.lengths.sum(axis=1) - granted).clip(min=0))
        held = (-(-store.lengths // store.page)).sum(axis=1)
        return np.asarray((held - granted // store.page).clip(min=0) * store.page)

    def close_up(self, state: Agreement) -> None:
        """Give back pages that layers took ahead, to grow into, if they make it more than the budget."""
        budget = state.recipe.budget
        stores = [layer.store for layer in state.layers if layer.store is not None and not layer.whole]
        held = sum(x.pool.bytes + (0 if x.tail is None else x.tail.bytes) for x in stores)
        if budget is None or budget.unit != "bytes" or held <= budget.amount:
            return
        for store in stores:
            if store.form is None and store.pool.total > int((-(-store.lengths // store.page)).sum()):
                valid, view = store.valid(), store.read()
                planes = {name: store.plane(name)[valid] for name in store.pool.planes}
                entries = (view.keys[valid], view.values[valid], store.positions()[valid])
                store.replace(*entries, store.lengths.copy(), planes=planes)


def _of_bytes(state: Agreement) -> bool:
    return state.recipe.budget is not None and state.recipe.budget.unit == "bytes"
