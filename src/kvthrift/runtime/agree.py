"""What the layers of a cache agree on: the recipe, when it acts, and how room is shared out between them.

Knows no forward pass and no model library.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate.listed import BudgetLayers
from kvthrift.core import LayerView, ModuleFacts, Rope, Signals
from kvthrift.errors import RecipeError
from kvthrift.recipe import Recipe
from kvthrift.runtime.byte_pages import BytePages
from kvthrift.runtime.cascade import Cascade
from kvthrift.runtime.compress import Foretold, check_floor, check_prompt, layer_totals, protected_entries
from kvthrift.runtime.fixed import FixedSteps
from kvthrift.runtime.layer import LayerCache
from kvthrift.runtime.meter import Meter
from kvthrift.runtime.received import plane_names
from kvthrift.runtime.second_pass import SecondLook
from kvthrift.runtime.sound import Soundness
from kvthrift.runtime.step import Columns, Ints, Step
from kvthrift.runtime.views import LayerViews
from kvthrift.store import LayerStore, entry_and_head_bytes, on_device

_FLOAT_BYTES = 4


class Agreement:
    """What one recipe comes to for several layers.

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
        check_timing(recipe)
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
        self.guesses = False  # the next pass may end with candidates that are taken back
        self.fixed: FixedSteps | None = None  # decode steps under way whose book-keeping is the device's
        self.segments: Tensor | None = None  # [B, P] of the text, if it was told; see segment_numbers
        self.prompt: Ints | None = None  # [B] tokens read before the first was decoded; never written in place
        self.look: SecondLook | None = None  # a second pass is under way: nothing of it is stored
        self.sound = Soundness()
        self._facts: dict[int, ModuleFacts] = {}  # of the pass in flight, for a compression of all layers at its end
        self._postponed = False  # this pass ends with a compression of all layers together
        self._weights: dict[int, Tensor] = {}
        self._cascade = Cascade()
        self._ropes: list[tuple[torch.device, Rope, Rope]] = []  # where, as the model told, and there
        self._mean: Ints | None = None  # entries per head the weighed layers share, [B]
        self.byte_pages = BytePages()
        self._step: Step | None = None
        self._next = 0
        self._beside: int | None = None  # bytes held outside the layer in flight
        self._held = 0  # bytes held when the last layer of the pass in flight was through

    # -- when ------------------------------------------------------------------------------------------------------

    def is_prompt(self, step: Step) -> bool:
        """Whether this pass is a prompt or a turn, rather than a few speculated tokens."""
        trigger = self.recipe.trigger
        if not self.recipe.compresses or not trigger.prompt or self.sealed:
            return False
        return self.columns.length == 0 or self.prompted or step.length >= trigger.min_turn

    def _lengthens(self, step: Step) -> bool:
        """Whether this pass belongs to what is read before the first token is decoded."""
        if self.columns.length == 0 or self.prompted:
            return True
        return step.length >= self.recipe.trigger.min_turn and np.array_equal(step.start, np.asarray(self.prompt))

    def due(self, layer: LayerViews) -> bool:
        """Whether so many tokens were decoded that the layer must be compressed before the next."""
        steps = self.recipe.trigger.steps(1 if layer.store is None else layer.store.batch)
        return steps is not None and not layer.whole and layer.since >= steps

    @property
    def until_due(self) -> int | None:
        """Tokens that may be decoded before layers must be compressed; None for any number."""
        layers = [layer for layer in self.layers if not layer.whole]
        steps = [self.recipe.trigger.steps(1 if x.store is None else x.store.batch) for x in layers]
        left = [every - x.since for every, x in zip(steps, layers, strict=True) if every is not None]
        return max(min(left), 0) if left else None

    def postpone(self) -> bool:
        """Compress all layers together when this pass is through; False, as nothing is compressed now."""
        self._postponed = True
        return False

    # -- how much --------------------------------------------------------------------------------------------------

    def per_head(self, view: LayerView, store: LayerStore) -> Tensor:
        """Entries per head that each sequence may hold on average, ``[B]`` int64."""
        return on_device(self.rooms(view, store)[1], view.keys.device)

    def rooms(self, view: LayerView, store: LayerStore) -> tuple[Ints, Ints]:
        """Tokens of each sequence so far, and entries per head that it may hold on average: ``[B]`` each."""
        seen = list(view.tokens)
        rooms = np.asarray(self._room(store, seen), dtype=np.int64)
        if self.needs.prompt and self.prompt is not None:
            check_prompt(self.recipe, self.prompt, rooms)
        return np.asarray(seen, dtype=np.int64), rooms

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
        listed = isinstance(self.recipe.layers, BudgetLayers)  # which holds what is listed where that is what fits
        share = self.byte_pages.differ(self) and not self.needs.prompt and not listed
        least = self.recipe.protect.entries if share else None
        return [
            budget.entries(n, heads=heads, entry_bytes=size, page=self.page, head_bytes=fixed, least=least)
            for n in seen
        ]

    @property
    def early(self) -> bool:
        """Whether a layer's numbers may be written in few bits before all layers are through: nothing cuts it again."""
        return self.recipe.layers.scope == "layer"

    def layer_total(self, layer: LayerViews, view: LayerView, scores: Tensor, rooms: Ints) -> Ints | Tensor:
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

    def _totals(self, per_head: Ints, lengths: dict[int, Ints]) -> dict[int, Ints]:
        found = sorted(self._weights)
        known = {layer.index: layer for layer in self.layers if not layer.whole}
        caps = []
        for index in found:
            caps.append(lengths[index] if index in lengths else self._cascade.held(known[index], len(per_head)))
        weights = [self._weights[index].to(self._weights[found[0]].device) for index in found]
        floor = self.byte_pages.floor(self)
        totals = layer_totals(weights, per_head, self.recipe.protect.entries, caps, self.layer_count, floor)
        return dict(zip(found, totals, strict=True))

    def shared_choice(self, layer: LayerViews) -> tuple[Tensor, Foretold | None] | None:
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

    # -- what is held ----------------------------------------------------------------------------------------------

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

    def held_by(self, layer: LayerViews) -> int:
        """The same while ``layer`` is in flight and no other changes."""
        return self.held if self._beside is None else self._beside + layer.bytes


def check_timing(recipe: Recipe) -> None:
    """Refuse what asks for a layer's module while no layer is run."""
    if recipe.layers.scope == "joint" and recipe.trigger.every is not None and recipe.needs.output_weight:
        raise RecipeError(
            f"recipe {recipe.name}: every={recipe.trigger.every} with layers={recipe.layers.name} compresses all "
            "layers before any is run, when no output projection is at hand. Leave out every or the refiner."
        )
