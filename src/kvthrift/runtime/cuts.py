"""How a layer of a cache is cut to its budget: in a forward pass, between two, or further as later layers arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerView, ModuleFacts
from kvthrift.runtime import received
from kvthrift.runtime.compress import Foretold, Kept, check_floor, choose, everything, foretell, gather
from kvthrift.runtime.step import Bools, Ints
from kvthrift.runtime.views import LayerViews, nbytes
from kvthrift.store import on_device

if TYPE_CHECKING:
    from kvthrift.runtime.state import CacheState


class LayerCuts(LayerViews):
    """A layer that can be compressed."""

    def _compress(self, state: CacheState, view: LayerView, facts: ModuleFacts) -> bool:
        """Cut the layer to its budget; False if everything fits (then nothing is stored)."""
        recipe, store = state.recipe, self.store
        if store is None or not recipe.compresses or self.whole:
            return False
        seen, rooms = state.rooms(view, store)
        self.since = 0
        whole = seen <= rooms  # [B]; of a longer text a layer may have to hold less than its heads' mean
        if recipe.budget is None:  # how much stays is for the layer to find
            whole = np.zeros_like(whole)
        if whole.all():
            return False
        with state.meter.compressing(view.keys.device):
            check_floor(recipe, rooms)
            self._ask(state, view, facts)
            state.sound.note(self.number, view.keys)
            planes = self._planes(state, view)
            keep, foretold, scores = self._choose(state, view, rooms, whole)
            self.chosen = (keep, foretold) if recipe.reuse > 1 else None
            if recipe.layers.scope != "model" and everything(keep, view, foretold):
                return False
            state.meter.compressions += 1
            if scores is not None and recipe.layers.scope == "model":
                planes["score"] = scores.clamp(min=torch.finfo(torch.float32).min)
            kept = gather(recipe, view, keep, scores, planes, foretold)
            copied = 0 if _same(view.keys, store.pool.keys) else nbytes(view.keys, view.values)
            state.meter.saw(state.held_by(self) + copied + 2 * nbytes(kept.keys, kept.values))
            self._hold(state, kept)
            state.cascade(self)
        return True

    def _choose(
        self, state: CacheState, view: LayerView, rooms: Ints, whole: Bools
    ) -> tuple[Tensor, Foretold | None, Tensor | None]:
        """What stays ``[B, H, T]``, what was known of it beforehand, and the scores it was chosen by, if it was here.

        Args:
            rooms: ``[B]`` entries per head, the mean over layers; ``whole [B]``: sequences that stay whole.
        """
        recipe, shared = state.recipe, state.shared_choice(self)
        if shared is not None and shared[0].shape == view.valid.shape:
            return *shared, None
        scores = recipe.scorer.score(view).float()
        totals = state.layer_total(self, view, scores, rooms)
        pages = state.byte_pages.room(state, self, rooms, totals)
        foretold = None if pages is not None or isinstance(totals, Tensor) else foretell(recipe, view, totals, whole)
        known = None if foretold is None else foretold.lengths
        per_head = totals if isinstance(totals, Tensor) else on_device(totals, scores.device)
        keep = choose(recipe, view, scores, per_head, known, pages)
        if known is None and whole.any():
            keep = torch.where(on_device(whole, keep.device)[:, None, None], view.valid, keep)
        return keep, foretold, scores

    def compress_now(self, state: CacheState, facts: ModuleFacts) -> None:
        """Cut what is held to the recipe's budget, outside a forward pass."""
        if self.store is None or not self.store.longest:
            return
        self._compress(state, self.stored_view(state), facts)

    def score(self, state: CacheState, facts: ModuleFacts) -> Tensor:
        """Importance ``[B, H, T]`` of what is held, between forward passes."""
        view = self.stored_view(state)
        self._ask(state, view, facts)
        state.sound.note(self.number, view.keys)
        return state.recipe.scorer.score(view).float()

    def cut_to(self, state: CacheState, scores: Tensor, counts: Tensor, fits: Tensor, facts: ModuleFacts) -> None:
        """Hold as many entries as were granted, between forward passes.

        Args:
            scores: ``[B, H, T]`` of what is held.
            counts: entries per head ``[B]``, which the recipe then splits, or of each head ``[B, H]``.
            fits: ``[B]`` bool, the sequences that stay whole.
            facts: what the layer's module can tell.
        """
        view = self.stored_view(state)
        self._ask(state, view, facts)
        pages = None if self.store is None else state.byte_pages.room(state, self, state.rooms(view, self.store)[1])
        keep = torch.where(fits[:, None, None], view.valid, choose(state.recipe, view, scores, counts, pages=pages))
        if torch.equal(keep, view.valid):
            return
        state.meter.compressions += 1
        kept = gather(state.recipe, view, keep, scores, self._planes(state, view))
        state.meter.saw(state.held_by(self) + 2 * nbytes(kept.keys, kept.values))
        self._hold(state, kept)

    def cut(self, state: CacheState, per_head: Ints) -> None:
        """Cut an already compressed layer further, by the scores it was compressed with; ``per_head [B]``."""
        store = self.store
        if store is None or "score" not in store.pool.planes:
            return
        view = self._stored_view(state, state.current_seen(store.batch))
        fits = state.byte_pages.overdue(state, store, per_head) == 0
        if fits.all():
            return
        view.rope = self.rope
        recipe = state.recipe.with_options(refine=None)
        scores = store.plane("score")
        planes = {name: store.plane(name) for name in store.pool.planes}
        pages = state.byte_pages.room(state, self, per_head, per_head)
        foretold = foretell(recipe, view, per_head, fits) if pages is None else None
        known = None if foretold is None else foretold.lengths
        keep = choose(recipe, view, scores, on_device(per_head, scores.device), known, pages)
        keep = torch.where(on_device(fits, keep.device)[:, None, None], view.valid, keep)
        self._hold(state, gather(recipe, view, keep, scores if recipe.merge.biased else None, planes, foretold))

    def rewrite(self, state: CacheState) -> None:
        """Write what is held as the recipe says, if that had to wait."""
        if self.store is not None:
            self.store.rewrite(self.form(state))

    def _hold(self, state: CacheState, kept: Kept) -> None:
        self.undo = None
        if self.store is not None:
            form = self.form(state) if state.early else None
            self.store.replace(kept.keys, kept.values, kept.positions, kept.lengths, planes=kept.planes, form=form)

    def _planes(self, state: CacheState, view: LayerView) -> dict[str, Tensor]:
        planes = {}
        if view.columns is not None:
            planes[received.COLUMNS] = view.columns
        planes |= {wanted.plane: sums for wanted, sums in view.powers.items()}
        if state.recipe.merge.biased:
            store = self.store
            held = store is not None and store.longest and "bias" in store.pool.planes
            planes["bias"] = (
                store.plane("bias")
                if store is not None and held
                else view.keys.new_zeros(view.valid.shape, dtype=torch.float32)
            )
        return planes


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
