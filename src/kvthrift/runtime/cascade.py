"""Budgets over the whole model while layers arrive: what earlier layers are to lose, and when they lose it.

Every layer that arrives takes room from those before it. Cutting all of them each time would move each entry over and
over, so they are cut once too much is held, the longest overdue first, and all of them behind the last layer. Which
entries stay does not depend on that: every layer ends with the best of the fewest that it was ever granted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvthrift.recipe import Recipe
from kvthrift.runtime.step import Ints

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache
    from kvthrift.runtime.state import CacheState
    from kvthrift.runtime.views import LayerViews

SLACK = 0.25  # of the budget, that may be held above it between layers


def lazy(recipe: Recipe) -> bool:
    """Whether a layer may be cut late: only where that keeps what cutting at once would keep."""
    return recipe.heads.nested and recipe.unit.nested and not recipe.merge.biased


class Cascade:
    """What finished layers were granted in the pass in flight, and do not hold themselves to yet."""

    def __init__(self) -> None:
        self._least: dict[int, Ints] = {}  # by layer: fewest entries per head that it was granted, [B]

    def held(self, layer: LayerCache, batch: int) -> Ints:
        """``[B]`` entries per head that a layer holds, rounded up, or that it will hold once it is cut."""
        store = layer.store
        if store is None:
            return np.zeros(batch, dtype=np.int64)
        there: Ints = -(-store.lengths.sum(axis=1) // store.shape.kv_heads)
        least = self._least.get(layer.index)
        return there if least is None else np.minimum(there, least).astype(np.int64)

    def go_on(self, state: CacheState, layer: LayerViews, totals: dict[int, Ints], budget: int) -> None:
        """Grant the layers before this one what their weights are worth now.

        Args:
            layer: the layer that has just been cut to its own share.
            totals: entries per head of every layer that was weighed, ``[B]`` each.
            budget: entries of all layers, heads and sequences.
        """
        if layer.index == 0:
            self._least.clear()
        earlier = [x for x in state.layers if not x.whole and x.index < layer.index and x.index in totals]
        for x in earlier:
            self._least[x.index] = np.minimum(totals[x.index], self._least.get(x.index, totals[x.index]))
        last = layer.index == state.layer_count - 1
        allowed = SLACK * budget if lazy(state.recipe) and not last else 0.0
        overdue = {x.index: self._overdue(state, x) for x in earlier}
        left = sum(overdue.values())
        if left > allowed:
            for x in sorted(earlier, key=lambda x: overdue[x.index], reverse=True):
                if left <= allowed / 2 or x.store is None:
                    break
                x.cut(state, self._least[x.index])
                left -= overdue[x.index]
        if last:
            self._least.clear()

    def _overdue(self, state: CacheState, layer: LayerCache) -> int:
        """Entries that a layer holds and is not granted any more."""
        store = layer.store
        return 0 if store is None else int(state.byte_pages.overdue(state, store, self._least[layer.index]).sum())
