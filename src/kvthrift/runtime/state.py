"""The whole cache: its layers, and what befalls all of them: passes, crops, forks, another recipe.

A forward pass visits the layers in order. Model-wide budgets are shared out among the layers seen so far, and
finished layers are cut further as later ones arrive. Knows no model library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import ModuleFacts, no_facts
from kvthrift.errors import CacheStateError, NoRoomError
from kvthrift.recipe import Recipe
from kvthrift.runtime.byte_pages import BytePages
from kvthrift.runtime.cascade import Cascade
from kvthrift.runtime.check import Checked
from kvthrift.runtime.joint import compress_jointly
from kvthrift.runtime.meter import Meter
from kvthrift.runtime.received import plane_names
from kvthrift.runtime.segments import cut_segments
from kvthrift.runtime.step import Ints, Step
from kvthrift.runtime.views import LayerViews
from kvthrift.store import settle


class CacheState(Checked):
    """A cache of several layers under one recipe; arguments as for :class:`Agreement`."""

    # -- one forward pass ------------------------------------------------------------------------------------------

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
            return self.fixed.attend(place, q, k, v, scale, facts)
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
            due = any(map(self.due, self.layers))
            if due:
                self._check_segments()
            self.sound.check()
            if self.columns.length and self.look is None and not due and not self.is_prompt(step):
                self._reserve(step)
        self._next = -1  # until this layer is through
        layer = self.layers[place]
        self._beside = (self.held if place == 0 else self._held) - layer.bytes
        out = layer.attend(self, q, k, v, scale=scale, step=step, facts=facts)
        self._held, self._beside = self.held_by(layer), None
        if self.recipe.layers.scope == "joint":
            self._facts[place] = facts
            if self.needs.rope and self.recipe.trigger.every is not None and not layer.whole:
                layer.turn_by(self, facts)  # later compressions come before any layer is reached
        self._next = place + 1
        if self._next == len(self.layers):
            self._finish(step)
        return out

    def _reserve(self, step: Step) -> None:
        """Take the pages of a pass for all layers before any layer changes, so that none is left half way."""
        try:
            for layer in self.layers:
                if layer.store is not None:
                    layer.store.reserve(step.counts)
        except NoRoomError as error:
            raise NoRoomError(f"{error} The cache is as it was, and goes on once there is room.") from error

    def _finish(self, step: Step) -> None:
        if self._lengthens(step):
            self.prompt = step.start + step.counts
        prompt = self.is_prompt(step)
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
        self.sound.send()
        settle(layer.store for layer in self.layers if layer.store is not None)
        self._write_late()
        if step.length > 1:
            self.meter.saw(self.held)
            keep = self.chunked or self.keeps_observations or self.recipe.trigger.every is not None
            for layer in self.layers:
                layer.settle(keep_observations=keep)
            self.segments = self.segments if keep else None
        if prompt:
            self.byte_pages.close_up(self)

    def _write_late(self) -> None:
        """Write in few bits what had to wait for the last layer."""
        if self.recipe.codec is not None:
            for layer in self.layers:
                layer.rewrite(self)

    @property
    def broken(self) -> bool:
        """Whether a forward pass stopped between layers."""
        return self._next != 0

    def cascade(self, layer: LayerViews) -> None:
        """Cut the layers before this one to what their weight is worth now."""
        if self.recipe.layers.scope != "model" or self._mean is None:
            return
        heads = 0 if layer.store is None else layer.store.shape.kv_heads
        budget = int(self._mean.sum()) * heads * self.layer_count
        self._cascade.go_on(self, layer, self._totals(self._mean, {}), budget)
        if self._beside is not None:
            self._beside = self.held - layer.bytes

    # -- keeping house ---------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget all columns from ``length`` on."""
        self.guesses = False
        if length >= self.columns.length:
            return
        gone = self.columns.length - length
        self.columns.crop(length)
        if self.segments is not None:
            longest = int(self.columns.seen(len(self.segments)).max(initial=0))
            self.segments = cut_segments(self.segments, longest)
        if self.prompt is not None:
            self.prompt = np.minimum(self.prompt, self.columns.seen(len(self.prompt))) if length else None
        self.sealed = self.sealed and length > 0  # an emptied cache is filled anew
        for layer in self.layers:
            layer.since = max(layer.since - gone, 0)
            if layer.store is not None:
                removed = torch.from_numpy(self.columns.seen(layer.store.batch))
                layer.rewind(self, removed)

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows [B']`` of the present ones, which may repeat."""
        self.columns.select(rows)
        self._mean = None
        self.prompt = None if self.prompt is None else self.prompt[rows]
        if self.segments is not None:
            self.segments = self.segments[torch.from_numpy(rows).to(self.segments.device)]
        self._weights = {index: weight[torch.from_numpy(rows)] for index, weight in self._weights.items()}
        for layer in self.layers:
            if layer.store is not None:
                layer.store.select(rows)
            layer.undo = None
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
        self.sound.send()
        settle(layer.store for layer in self.layers if layer.store is not None)
        self._write_late()
        for layer in self.layers:
            layer.settle(keep_observations=recipe.trigger.every is not None)
            if layer.store is not None:
                layer.store.forget(set(plane_names(read)) - set(plane_names(recipe.needs)))
        self.segments = self.segments if recipe.needs.segments and recipe.trigger.every is not None else None
        self.byte_pages.close_up(self)

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
        other.meter, other.fixed, other.sound = Meter(), None, self.sound.fork()
        other._weights, other._cascade, other.byte_pages = dict(self._weights), Cascade(), BytePages()
        return other
