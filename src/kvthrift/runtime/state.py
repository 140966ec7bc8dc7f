"""The whole cache: its layers, the recipe they follow, and what has to be agreed between layers.

A forward pass visits the layers in order. Model-wide budgets are shared out among the layers seen so far, and
finished layers are cut further as later ones arrive. Knows no model library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerView, ModuleFacts, Signals
from kvthrift.errors import CacheStateError, MissingSignalError, RecipeError
from kvthrift.recipe import Recipe
from kvthrift.runtime.compress import check_floor, layer_totals
from kvthrift.runtime.fixed import FixedSteps
from kvthrift.runtime.layer import LayerCache
from kvthrift.runtime.meter import Meter
from kvthrift.runtime.step import Columns, Ints, Step
from kvthrift.store import LayerStore

_FLOAT_BYTES = 4


class CacheState:
    """A cache of several layers under one recipe.

    Args:
        recipe: what to keep.
        numbers: the model's own numbers of the layers, in the order they run.
        whole: which of those keep every entry.
        page: entries a page.
        observe: signals to gather and keep although ``recipe`` does not need them, for :meth:`under`.
    """

    def __init__(
        self, recipe: Recipe, numbers: list[int], whole: set[int], *, page: int = 64, observe: Signals | None = None
    ) -> None:
        if recipe.budget is not None and recipe.budget.unit == "entries":
            check_floor(recipe, torch.tensor([int(recipe.budget.amount)]))
        self.recipe = recipe
        self.page = page
        self.needs: Signals = recipe.needs
        self.observes: Signals = (recipe.needs if recipe.budget is not None else Signals()) | (observe or Signals())
        self.keeps_observations = observe is not None
        self.layers: list[LayerCache] = []
        index = 0
        for number in numbers:
            self.layers.append(LayerCache(index, number, whole=number in whole))
            index += number not in whole
        self.layer_count = max(index, 1)
        self.columns = Columns()
        self.meter = Meter()
        self.prompted = False  # what comes is part of a prompt, however few tokens it has
        self.chunked = False  # more chunks of the same prompt are to come: keep observations
        self.sealed = False  # the context is read: later passes are questions about it, and add to it uncompressed
        self.fixed: FixedSteps | None = None  # decode steps under way whose book-keeping is the device's
        self._weights: dict[int, Tensor] = {}
        self._mean: Tensor | None = None  # entries per head the weighed layers share, [B]
        self._step: Step | None = None
        self._next = 0

    # -- one forward pass ----------------------------------------------------------------------------------------

    def attend(
        self, place: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, facts: ModuleFacts
    ) -> Tensor:
        """One layer's part of a forward pass; see :meth:`LayerCache.attend`.

        Args:
            place: which of ``layers``; they must be visited in order.
            mask: ``[B, past + Q]`` bool, False for padding, or None.

        Raises:
            CacheStateError: an earlier pass did not get through all layers.
            MaskError: the mask contradicts earlier ones.
            ModelMismatchError: the batch, heads or dtype are not those of earlier passes.
        """
        if self.fixed is not None:
            return self.fixed.attend(self.layers[place], q, k, v, scale)
        if place != self._next:
            raise CacheStateError(
                f"layer {self.layers[place].number} is not the one that is due: an earlier forward pass failed half "
                "way, so some layers hold tokens that others do not. Call reset() and start again, or go on "
                "from a fork made before."
            )
        if place == 0:
            self._step = self.columns.step(q.shape[0], q.shape[2], mask, q.device)
        step = self._step
        if step is None:
            raise CacheStateError("a forward pass must begin at the first layer.")
        store = self.layers[place].store_for(self, q, k, v)  # refused before anything changes
        if place == 0:
            self._check_room(store, step)
        self._next = -1  # until this layer is through
        out = self.layers[place].attend(self, q, k, v, scale=scale, step=step, facts=facts)
        self._next = place + 1
        if self._next == len(self.layers):
            self._finish(step)
        return out

    def _finish(self, step: Step) -> None:
        self.columns.advance(step)
        self._next, self._step = 0, None
        if self.recipe.reuse > 1:
            for layer in self.layers:
                layer.chosen = None
        if step.length > 1:
            self.meter.saw(self.held)
            keep = self.chunked or self.keeps_observations or self.recipe.trigger.every is not None
            for layer in self.layers:
                layer.settle(keep_observations=keep)

    @property
    def broken(self) -> bool:
        """Whether a forward pass stopped between layers."""
        return self._next != 0

    # -- what layers ask -----------------------------------------------------------------------------------------

    def is_prompt(self, step: Step) -> bool:
        """Whether this pass is a prompt or a turn, rather than a few speculated tokens."""
        trigger = self.recipe.trigger
        if self.recipe.budget is None or not trigger.prompt or self.sealed:
            return False
        return self.columns.length == 0 or self.prompted or step.length >= trigger.min_turn

    def due(self, layer: LayerCache) -> bool:
        """Whether so many tokens were decoded that the layer must be compressed before the next."""
        every = self.recipe.trigger.every
        return every is not None and not layer.whole and layer.since >= every

    def per_head(self, view: LayerView, store: LayerStore) -> Tensor:
        """Entries per head that each sequence may hold on average, ``[B]`` int64."""
        if self.recipe.budget is None:
            return view.seen
        return torch.tensor(self._room(store, view.seen.tolist()), device=view.keys.device)

    def _room(self, store: LayerStore, seen: list[int]) -> list[int]:
        """Entries per head that the budget comes to for sequences of so many tokens."""
        budget, shape = self.recipe.budget, store.shape
        if budget is None:
            return seen
        planes = int(self.observes.columns) + int(self.recipe.merge.biased)
        size = (shape.key_dim + shape.value_dim) * store.pool.keys.element_size() + _FLOAT_BYTES * (1 + planes)
        heads = self.layer_count * shape.kv_heads * store.batch
        return [budget.entries(n, heads=heads, entry_bytes=size, page=self.page) for n in seen]

    def _check_room(self, store: LayerStore, step: Step) -> None:
        """Refuse a prompt of which the budget could not hold what is protected, before anything has changed."""
        if self.is_prompt(step):
            seen = (step.start + step.counts).tolist()
            rooms = [room for n, room in zip(seen, self._room(store, seen), strict=True) if n > room]
            if rooms:
                check_floor(self.recipe, torch.tensor(rooms))

    def layer_total(self, layer: LayerCache, view: LayerView, scores: Tensor, per_head: Tensor) -> Tensor:
        """Entries per head of this layer, ``[B]`` int64."""
        protected = self.recipe.protect.entries
        if self.recipe.layers.scope == "layer":
            return self.recipe.layers.total(view, per_head, protected)
        self._mean = per_head
        self._weights[layer.index] = self.recipe.layers.weight(view, scores)
        totals = self._totals(per_head, {layer.index: view.lengths.amax(dim=1).cpu().numpy()})
        return torch.from_numpy(totals[layer.index]).to(view.keys.device)

    def cascade(self, layer: LayerCache) -> None:
        """Cut the layers before this one to what their weight is worth now."""
        if self.recipe.layers.scope == "layer" or self._mean is None:
            return
        totals = self._totals(self._mean, {})
        for earlier in self.layers:
            if (
                earlier.index < layer.index
                and not earlier.whole
                and earlier.index in totals
                and earlier.store is not None
            ):
                earlier.cut(self, torch.from_numpy(totals[earlier.index]).to(earlier.store.device))

    def _totals(self, per_head: Tensor, lengths: dict[int, Ints]) -> dict[int, Ints]:
        found = sorted(self._weights)
        device = per_head.device
        known = {layer.index: layer for layer in self.layers if not layer.whole}
        caps = []
        for index in found:
            store = known[index].store
            held = (
                np.zeros(len(per_head), dtype=np.int64)
                if store is None
                else -(-store.lengths.sum(axis=1) // store.shape.kv_heads)
            )
            caps.append(lengths.get(index, held))
        weights = [self._weights[index].to(device) for index in found]
        totals = layer_totals(weights, per_head, self.recipe.protect.entries, caps, self.layer_count)
        return dict(zip(found, totals, strict=True))

    def shared_choice(self, layer: LayerCache) -> Tensor | None:
        """What the layer this one copies kept, if it copies one."""
        behind = layer.index % self.recipe.reuse
        if not behind:
            return None
        return next(x.chosen for x in self.layers if not x.whole and x.index == layer.index - behind)

    def current_seen(self, batch: int) -> Ints:
        """``[B]`` tokens of each sequence, those of the pass in flight included."""
        seen = self.columns.seen(batch)
        return seen if self._step is None else self._step.start + self._step.counts

    # -- keeping house -------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> tuple[int, ...]:
        """The model's own numbers of the layers that are not left whole."""
        return tuple(layer.number for layer in self.layers if not layer.whole)

    @property
    def held(self) -> int:
        """Bytes held in all layers, and by what they agreed on."""
        agreed = [*self._weights.values(), *([] if self._mean is None else [self._mean])]
        return sum(layer.bytes for layer in self.layers) + sum(t.numel() * t.element_size() for t in agreed)

    def crop(self, length: int) -> None:
        """Forget all columns from ``length`` on."""
        if length >= self.columns.length:
            return
        self.columns.crop(length)
        self.sealed = self.sealed and length > 0  # an emptied cache is filled anew
        for layer in self.layers:
            if layer.store is not None:
                removed = torch.from_numpy(self.columns.seen(layer.store.batch))
                layer.rewind(removed)

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows [B']`` of the present ones, which may repeat."""
        self.columns.select(rows)
        self._mean = None
        self._weights = {index: weight[torch.from_numpy(rows)] for index, weight in self._weights.items()}
        for layer in self.layers:
            if layer.store is not None:
                layer.store.select(rows)
            for part in (layer.window, layer.statistics):
                if part is not None:
                    part.select(rows)

    def under(self, recipe: Recipe, whole: set[int], facts: Sequence[ModuleFacts]) -> CacheState:
        """A fork of this uncompressed cache, compressed now under another recipe; this one stays as it is.

        Args:
            recipe: what to keep.
            whole: layers (the model's numbers) that keep every entry.
            facts: what each layer's module can tell, in the order of ``layers``.

        Raises:
            RecipeError: this cache has dropped entries already.
            MissingSignalError: a signal the recipe needs was not observed.
        """
        if self.recipe.budget is not None:
            raise RecipeError(
                "entries were dropped already, so another recipe cannot choose among them. Start from 'full'."
            )
        missed = unobserved(recipe.needs, self.observes)
        if missed:
            raise MissingSignalError(
                f"recipe {recipe.name} needs {recipe.needs}, but reading gathered {self.observes}. Name the recipe in "
                "observe= when the context is read."
            )
        other = self.fork()
        other.recipe, other.needs, other.observes = recipe, recipe.needs, recipe.needs
        other.keeps_observations, other.sealed = False, True
        index = 0
        for layer in other.layers:
            layer.index, layer.whole = index, layer.number in whole
            index += not layer.whole
        other.layer_count = max(index, 1)
        for layer, known in zip(other.layers, facts, strict=True):
            layer.compress_now(other, known)
        for layer in other.layers:
            layer.settle(keep_observations=recipe.trigger.every is not None)
            if layer.store is not None and not recipe.needs.columns:
                layer.store.forget(("columns",))
        return other

    def fork(self) -> CacheState:
        """Another cache with the same entries, sharing pages until one side writes to them.

        Raises:
            CacheStateError: a forward pass is under way or failed.
        """
        if self.broken:
            raise CacheStateError("a forward pass is under way or failed half way, so there is nothing whole to fork.")
        other = object.__new__(CacheState)
        other.__dict__.update(self.__dict__)
        other.layers = [layer.fork() for layer in self.layers]
        other.columns = self.columns.fork()
        other.meter, other.fixed = Meter(), None
        other._weights = dict(self._weights)
        return other


def unobserved(needs: Signals, observes: Signals) -> bool:
    """Whether ``observes`` lacks something of ``needs`` (what a module can tell any time is never missed)."""
    moments = needs.moments and not (observes.moments and observes.moments_after == needs.moments_after)
    return needs.window > observes.window or moments or (needs.columns and not observes.columns)
