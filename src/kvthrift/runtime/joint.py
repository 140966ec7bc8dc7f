"""All layers done: every layer is scored, then room is shared out over all of them, then each is cut.

For allocators that have to see every layer's scores first. One layer at a time is laid out anew, so that the peak is
the uncompressed cache, the scores of all layers, and one layer more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.core import ModuleFacts
from kvthrift.runtime.compress import check_floor

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache
    from kvthrift.runtime.state import CacheState


def compress_jointly(state: CacheState, facts: Sequence[ModuleFacts]) -> bool:
    """Cut all layers to the recipe's budget, between forward passes; False if everything fits.

    Args:
        state: a cache whose recipe's layer allocator has ``scope="joint"``.
        facts: what each layer's module can tell, in the order of ``layers``.

    Raises:
        BudgetError: the budget is below what the recipe protects.
    """
    recipe = state.recipe
    rows = [(x, known) for x, known in zip(state.layers, facts, strict=True) if not x.whole and x.store is not None]
    for layer, _ in rows:
        layer.since = 0
    if not rows or recipe.budget is None:
        return False
    view = rows[0][0].stored_view(state)
    store = rows[0][0].store
    assert store is not None
    per_head = state.per_head(view, store)
    fits = view.seen <= per_head
    del view
    if bool(fits.all()):
        return False
    check_floor(recipe, per_head)
    with state.meter.compressing(per_head.device):
        scores = [layer.score(state, known) for layer, known in rows]
        state.meter.saw(state.held + sum(t.numel() * t.element_size() for t in scores))
        stores = [layer.store for layer, _ in rows if layer.store is not None]
        scores = recipe.layers.agree(scores, [x.positions() for x in stores], [x.valid() for x in stores])
        contests = [_contest(state, layer, found) for (layer, _), found in zip(rows, scores, strict=True)]
        counts = recipe.layers.share(contests, per_head)
        for (layer, known), found, count in zip(rows, scores, counts, strict=True):
            layer.cut_to(state, found, count, fits, known)
    return True


def _contest(state: CacheState, layer: LayerCache, scores: Tensor) -> Tensor:
    store = layer.store
    assert store is not None
    valid, positions, protect = store.valid(), store.positions(), state.recipe.protect
    steps = torch.arange(valid.shape[-1], device=valid.device)
    lengths = valid.sum(dim=-1, keepdim=True)
    protected = (positions < protect.sinks) | (steps >= lengths - protect.recent)
    return scores.masked_fill(protected, float("inf")).masked_fill(~valid, float("-inf"))
