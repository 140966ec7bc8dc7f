"""The whole cache: its layers, the recipe they follow, and what has to be agreed between layers.

A forward pass visits the layers in order. Model-wide budgets are shared out among the layers seen so far, and
finished layers are cut further as later ones arrive. Knows no model library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerView, ModuleFacts, Rope, Signals, no_facts
from kvthrift.errors import CacheStateError, MissingSignalError, RecipeError
from kvthrift.recipe import Recipe
from kvthrift.runtime.cascade import Cascade
from kvthrift.runtime.compress import Foretold, check_floor, layer_totals, protected_entries
from kvthrift.runtime.fixed import FixedSteps
from kvthrift.runtime.joint import compress_jointly
from kvthrift.runtime.layer import LayerCache
from kvthrift.runtime.meter import Meter
from kvthrift.runtime.received import plane_names
from kvthrift.runtime.second_pass import SecondLook
from kvthrift.runtime.segments import cut_segments
from kvthrift.runtime.step import Columns, Ints, Step
from kvthrift.store import LayerStore, entry_and_head_bytes, on_device, settle

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
            check_floor(recipe, np.asarray([int(recipe.budget.amount)]))
        _check_timing(recipe)
        self.recipe = recipe
        self.page = page
        self.needs: Signals = recipe.needs
        self.observes: Signals = (recipe.needs if recipe.compresses else Signals()) | (observe or Signals())
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
        self.segments: Tensor | None = None  # [B, P] of the text, if it was told; see segment_numbers
        self.look: SecondLook | None = None  # a second pass is under way: nothing of it is stored
        self._facts: dict[int, ModuleFacts] = {}  # of the pass in flight, for a compression of all layers at its end
        self._postponed = False  # this pass ends with a compression of all layers together
        self._weights: dict[int, Tensor] = {}
        self._cascade = Cascade()
        self._ropes: list[tuple[torch.device, Rope, Rope]] = []  # where, as the model told, and there
        self._mean: Ints | None = None  # entries per head the weighed layers share, [B]
        self._step: Step | None = None
        self._next = 0
        self._beside: int | None = None  # bytes held outside the layer in flight
        self._held = 0  # bytes held when the last layer of the pass in flight was through

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
            if self.recipe.layers.scope == "joint" and self.layers and any(map(self.due, self.layers)):
                compress_jointly(self, [no_facts("it is asked for before a layer is reached")] * len(self.layers))
        step = self._step
        if step is None:
            raise CacheStateError("a forward pass must begin at the first layer.")
        store = self.layers[place].store_for(self, q, k, v)  # refused before anything changes
        if place == 0:
            self._check_room(store, step)
            if any(map(self.due, self.layers)):
                self._check_segments()
        self._next = -1  # until this layer is through
        layer = self.layers[place]
        self._beside = (self.held if place == 0 else self._held) - layer.bytes
        out = layer.attend(self, q, k, v, scale=scale, step=step, facts=facts)
        self._held, self._beside = self.held_by(layer), None
        if self.recipe.layers.scope == "joint":
            self._facts[place] = facts
        self._next = place + 1
        if self._next == len(self.layers):
            self._finish(step)
        return out

    def _finish(self, step: Step) -> None:
        self.columns.advance(step)
        self._next, self._step = 0, None
        facts, self._facts = [known for _, known in sorted(self._facts.items())], {}
        if self._postponed:
            self._postponed = False
            self.meter.saw(self.held)
            compress_jointly(self, facts)
        if self.recipe.reuse > 1:
            for layer in self.layers:
                layer.chosen = None
        settle(layer.store for layer in self.layers if layer.store is not None)
        self._write_late()
        if step.length > 1:
            self.meter.saw(self.held)
            keep = self.chunked or self.keeps_observations or self.recipe.trigger.every is not None
            for layer in self.layers:
                layer.settle(keep_observations=keep)
            self.segments = self.segments if keep else None

    def _write_late(self) -> None:
        """Write in few bits what had to wait for the last layer."""
        if self.recipe.codec is not None:
            for layer in self.layers:
                layer.rewrite(self)

    @property
    def broken(self) -> bool:
        """Whether a forward pass stopped between layers."""
        return self._next != 0

    # -- what layers ask -----------------------------------------------------------------------------------------

    def is_prompt(self, step: Step) -> bool:
        """Whether this pass is a prompt or a turn, rather than a few speculated tokens."""
        trigger = self.recipe.trigger
        if not self.recipe.compresses or not trigger.prompt or self.sealed:
            return False
        return self.columns.length == 0 or self.prompted or step.length >= trigger.min_turn

    def due(self, layer: LayerCache) -> bool:
        """Whether so many tokens were decoded that the layer must be compressed before the next."""
        every = self.recipe.trigger.every
        return every is not None and not layer.whole and layer.since >= every

    def postpone(self) -> bool:
        """Compress all layers together when this pass is through; False, as nothing is compressed now."""
        self._postponed = True
        return False

    def per_head(self, view: LayerView, store: LayerStore) -> Tensor:
        """Entries per head that each sequence may hold on average, ``[B]`` int64."""
        return on_device(self.rooms(view, store)[1], view.keys.device)

    def rooms(self, view: LayerView, store: LayerStore) -> tuple[Ints, Ints]:
        """Tokens of each sequence so far, and entries per head that it may hold on average: ``[B]`` each."""
        seen = list(view.tokens)
        return np.asarray(seen, dtype=np.int64), np.asarray(self._room(store, seen), dtype=np.int64)

    def _room(self, store: LayerStore, seen: list[int]) -> list[int]:
        """Entries per head that the budget comes to for sequences of so many tokens."""
        budget, shape = self.recipe.budget, store.shape
        if budget is None:
            return seen
        planes = len(plane_names(self.observes)) + int(self.recipe.merge.biased)
        form = None if self.recipe.codec is None else self.recipe.codec.format
        size, fixed = entry_and_head_bytes(shape, store.dtype, self.page, form)
        size += _FLOAT_BYTES * (1 + planes)
        heads = self.layer_count * shape.kv_heads * store.batch
        return [budget.entries(n, heads=heads, entry_bytes=size, page=self.page, head_bytes=fixed) for n in seen]

    @property
    def early(self) -> bool:
        """Whether a layer's numbers may be written in few bits before all layers are through: nothing cuts it again."""
        return self.recipe.layers.scope == "layer"

    def _check_room(self, store: LayerStore, step: Step) -> None:
        """Refuse a prompt of which the budget could not hold what is protected, before anything has changed.

        A recipe that looks twice is refused as well: a forward pass looks once.
        """
        if self.needs.second_pass and self.recipe.compresses and not self.sealed:
            raise MissingSignalError(
                f"recipe {self.recipe.name} scores a context by a second pass over it, which a forward pass or "
                "generate() by itself cannot make. Read the context with kvthrift.prefill(model, ids, recipe) and ask "
                "behind it (on the command line: --hide-question)."
            )
        if self.is_prompt(step):
            seen = (step.start + step.counts).tolist()
            rooms = [room for n, room in zip(seen, self._room(store, seen), strict=True) if n > room]
            if rooms or self.recipe.layers.decides:
                self._check_segments()
            if rooms:
                check_floor(self.recipe, np.asarray(rooms))

    def _check_segments(self, recipe: Recipe | None = None) -> None:
        """Refuse to compress by segments of a text whose tokens nobody told."""
        recipe = self.recipe if recipe is None else recipe
        if recipe.needs.segments and self.segments is None:
            raise MissingSignalError(
                f"recipe {recipe.name} cuts the text at its punctuation, but a forward pass or generate() by itself "
                "does not tell the cache which tokens it reads. Read the text with kvthrift.prefill(model, ids, "
                "recipe, tokenizer=tokenizer) or kvthrift.generate(model, ids, cache, tokenizer=tokenizer), or call "
                "cache.tell(ids, tokenizer=tokenizer) first."
            )

    def layer_total(self, layer: LayerCache, view: LayerView, scores: Tensor, rooms: Ints) -> Ints | Tensor:
        """Entries per head of this layer, ``[B]`` int64: on the host, if it can tell without a look at scores."""
        protected = self.recipe.protect.entries
        if self.recipe.layers.decides:
            wanted = self.recipe.layers.stop(view, scores, protected_entries(self.recipe, view))
            return torch.minimum(wanted, on_device(rooms, wanted.device)).clamp(min=protected)
        if self.recipe.layers.scope == "layer":
            totals = self.recipe.layers.total(view, torch.from_numpy(rooms), protected)
            return np.asarray(totals.numpy(), dtype=np.int64) if totals.device.type == "cpu" else totals
        self._mean = rooms
        self._weights[layer.index] = self.recipe.layers.weight(view, scores)
        return self._totals(rooms, {layer.index: view.counted.max(axis=1)})[layer.index]

    def cascade(self, layer: LayerCache) -> None:
        """Cut the layers before this one to what their weight is worth now."""
        if self.recipe.layers.scope != "model" or self._mean is None:
            return
        heads = 0 if layer.store is None else layer.store.shape.kv_heads
        budget = int(self._mean.sum()) * heads * self.layer_count
        self._cascade.go_on(self, layer, self._totals(self._mean, {}), budget)
        if self._beside is not None:
            self._beside = self.held - layer.bytes

    def _totals(self, per_head: Ints, lengths: dict[int, Ints]) -> dict[int, Ints]:
        found = sorted(self._weights)
        known = {layer.index: layer for layer in self.layers if not layer.whole}
        caps = []
        for index in found:
            caps.append(lengths[index] if index in lengths else self._cascade.held(known[index], len(per_head)))
        weights = [self._weights[index].to(self._weights[found[0]].device) for index in found]
        totals = layer_totals(weights, per_head, self.recipe.protect.entries, caps, self.layer_count)
        return dict(zip(found, totals, strict=True))

    def shared_choice(self, layer: LayerCache) -> tuple[Tensor, Foretold | None] | None:
        """What the layer this one copies kept, if it copies one."""
        behind = layer.index % self.recipe.reuse
        if not behind:
            return None
        return next(x.chosen for x in self.layers if not x.whole and x.index == layer.index - behind)

    def current_seen(self, batch: int) -> Ints:
        """``[B]`` tokens of each sequence, those of the pass in flight included."""
        seen = self.columns.seen(batch)
        return seen if self._step is None else self._step.start + self._step.counts

    def shared_rope(self, rope: Rope, device: torch.device) -> tuple[Rope, bool]:
        """The same rotary embedding on a device, one object for all layers that have it; and whether it is new."""
        for place, known, there in self._ropes:
            same = place == device and known.attention_scaling == rope.attention_scaling
            if same and known.inv_freq.device == rope.inv_freq.device and torch.equal(known.inv_freq, rope.inv_freq):
                return there, False
        here = rope.inv_freq.device.type == "cpu"
        inv_freq = on_device(rope.inv_freq.numpy(), device) if here else rope.inv_freq.to(device)
        self._ropes = [*self._ropes, (device, rope, Rope(inv_freq, rope.attention_scaling))]
        return self._ropes[-1][2], True

    # -- keeping house -------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> tuple[int, ...]:
        """The model's own numbers of the layers that are not left whole."""
        return tuple(layer.number for layer in self.layers if not layer.whole)

    @property
    def held(self) -> int:
        """Bytes held in all layers, and by what they agreed on."""
        agreed: list[Tensor] = [*self._weights.values()]
        agreed += [] if self.segments is None else [self.segments]
        return sum(layer.bytes for layer in self.layers) + sum(t.numel() * t.element_size() for t in agreed)

    def held_by(self, layer: LayerCache) -> int:
        """The same while ``layer`` is in flight and no other changes."""
        return self.held if self._beside is None else self._beside + layer.bytes

    def crop(self, length: int) -> None:
        """Forget all columns from ``length`` on."""
        if length >= self.columns.length:
            return
        self.columns.crop(length)
        if self.segments is not None:
            longest = int(self.columns.seen(len(self.segments)).max(initial=0))
            self.segments = cut_segments(self.segments, longest)
        self.sealed = self.sealed and length > 0  # an emptied cache is filled anew
        for layer in self.layers:
            if layer.store is not None:
                removed = torch.from_numpy(self.columns.seen(layer.store.batch))
                layer.rewind(removed)

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows [B']`` of the present ones, which may repeat."""
        self.columns.select(rows)
        self._mean = None
        if self.segments is not None:
            self.segments = self.segments[torch.from_numpy(rows).to(self.segments.device)]
        self._weights = {index: weight[torch.from_numpy(rows)] for index, weight in self._weights.items()}
        for layer in self.layers:
            if layer.store is not None:
                layer.store.select(rows)
            for part in (layer.window, layer.statistics):
                if part is not None:
                    part.select(rows)
            for known, scores in layer.second_pass.items():
                layer.second_pass[known] = scores[torch.from_numpy(rows).to(scores.device)]

    def under(self, recipe: Recipe, whole: set[int], facts: Sequence[ModuleFacts]) -> CacheState:
        """A fork of this uncompressed cache, compressed now under another recipe; this one stays as it is.

        Arguments and errors are those of :meth:`adopt`.
        """
        self._check_adoption(recipe)
        other = self.fork()
        other.adopt(recipe, whole, facts)
        return other

    def adopt(self, recipe: Recipe, whole: set[int], facts: Sequence[ModuleFacts]) -> None:
        """Compress this uncompressed cache now, and follow another recipe from here on.

        Args:
            recipe: what to keep.
            whole: layers (the model's numbers) that keep every entry.
            facts: what each layer's module can tell, in the order of ``layers``.

        Raises:
            RecipeError: this cache has dropped entries already, or the recipe cannot be honoured here.
            MissingSignalError: a signal the recipe needs was not observed.
        """
        self._check_adoption(recipe)
        read = self.observes
        self.recipe, self.needs, self.observes = recipe, recipe.needs, recipe.needs
        self.keeps_observations, self.sealed = False, True
        index = 0
        for layer in self.layers:
            layer.index, layer.whole = index, layer.number in whole
            index += not layer.whole
        self.layer_count = max(index, 1)
        if recipe.layers.scope == "joint":
            compress_jointly(self, facts)
        else:
            for layer, known in zip(self.layers, facts, strict=True):
                layer.compress_now(self, known)
        settle(layer.store for layer in self.layers if layer.store is not None)
        self._write_late()
        for layer in self.layers:
            layer.settle(keep_observations=recipe.trigger.every is not None)
            if layer.store is not None:
                layer.store.forget(set(plane_names(read)) - set(plane_names(recipe.needs)))
        self.segments = self.segments if recipe.needs.segments and recipe.trigger.every is not None else None

    def _check_adoption(self, recipe: Recipe) -> None:
        _check_timing(recipe)
        if self.recipe.compresses:
            raise RecipeError(
                "entries were dropped already, so another recipe cannot choose among them. Start from 'full'."
            )
        if self.recipe.codec is not None:
            raise RecipeError(
                f"this cache keeps its entries in {self.recipe.codec.name}, so another recipe would begin with rounded "
                "numbers. Read the context without a codec."
            )
        missed = unobserved(recipe.needs, self.observes)
        if missed:
            raise MissingSignalError(
                f"recipe {recipe.name} needs {recipe.needs}, but reading gathered {self.observes}. Name the recipe in "
                "observe= when the context is read."
            )
        if recipe.compresses:
            self._check_segments(recipe)
        for wanted in recipe.needs.second_pass if recipe.compresses else ():
            if recipe.trigger.every is not None:
                raise RecipeError(
                    f"recipe {recipe.name} scores a context by a second pass over it, and there is none over what is "
                    f"decoded behind it, so every={recipe.trigger.every} cannot be honoured. Leave every out."
                )
            found = [layer.second_pass.get(wanted) for layer in self.layers]
            held = [0 if layer.store is None else layer.store.longest for layer in self.layers]
            if any(x is None or x.shape[-1] != n for x, n in zip(found, held, strict=True)):
                raise MissingSignalError(
                    f"recipe {recipe.name} needs a second pass over all that is held, and none was made. Read the "
                    "context with kvthrift.prefill, the recipe given or named in observe=."
                )

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
        other._weights, other._cascade = dict(self._weights), Cascade()
        return other


def _check_timing(recipe: Recipe) -> None:
    """Refuse what asks for a layer's module while no layer is run."""
    if recipe.layers.scope == "joint" and recipe.trigger.every is not None and recipe.needs.output_weight:
        raise RecipeError(
            f"recipe {recipe.name}: every={recipe.trigger.every} with layers={recipe.layers.name} compresses all "
            "layers before any is run, when no output projection is at hand. Leave out every or the refiner."
        )


def unobserved(needs: Signals, observes: Signals) -> bool:
    """Whether ``observes`` lacks something of ``needs`` (what a module can tell any time is never missed)."""
    moments = needs.moments and not (observes.moments and observes.moments_after == needs.moments_after)
    second = not set(needs.second_pass) <= set(observes.second_pass) or not set(needs.powers) <= set(observes.powers)
    return needs.window > observes.window or moments or second or (needs.columns and not observes.columns)
