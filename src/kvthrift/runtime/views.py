"""What a layer of a cache holds and has seen of its queries, and how parts are shown it. Knows no model library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvthrift.core import LayerView, ModuleFacts, Rope, SecondPass
from kvthrift.errors import CacheStateError
from kvthrift.kernels.codes import Format
from kvthrift.runtime import received
from kvthrift.runtime.compress import Foretold
from kvthrift.runtime.observe import QueryStatistics, QueryWindow
from kvthrift.runtime.step import Ints, Step
from kvthrift.runtime.undo import Undo
from kvthrift.store import LayerStore, on_device

if TYPE_CHECKING:
    from kvthrift.runtime.state import CacheState


class LayerViews:
    """The store of one attention layer and the signals that are gathered beside it.

    Args:
        index: place among the compressed layers.
        number: the model's own number of this layer.
        whole: keep every entry, whatever the recipe says.
    """

    def __init__(self, index: int, number: int, *, whole: bool = False) -> None:
        self.index = index
        self.number = number
        self.whole = whole
        self.store: LayerStore | None = None
        self.scale = 1.0
        self.group = 1
        self.since = 0  # tokens appended since the last compression
        self.rope: Rope | None = None
        self.owns_rope = False  # others share it, and it counts but once
        self.window: QueryWindow | None = None
        self.statistics: QueryStatistics | None = None
        self.undo: Undo | None = None  # what the newest pass can be taken back by, if it was short
        self.second_pass: dict[SecondPass, Tensor] = {}  # [B, H, T] each, of a context that is whole
        self.chosen: tuple[Tensor, Foretold | None] | None = None  # by the last compression, for layers that reuse it

    @property
    def bytes(self) -> int:
        """Bytes held: store, observations, and what the module told."""
        held = self.store.bytes if self.store is not None else 0
        held += 0 if self.rope is None or not self.owns_rope else nbytes(self.rope.inv_freq)
        held += nbytes(*self.second_pass.values())
        return held + sum(part.bytes for part in (self.window, self.statistics, self.undo) if part is not None)

    def form(self, state: CacheState) -> Format | None:
        """How this layer's full pages are to be written; None for as they are."""
        return None if state.recipe.codec is None or self.whole else state.recipe.codec.format

    def _counts(self, state: CacheState) -> bool:
        return bool(received.plane_names(state.observes)) and not self.whole

    def _short(self, state: CacheState, step: Step) -> bool:
        """Whether a pass has as few tokens as a speculation, some of which may be taken back."""
        return 1 < step.length < state.recipe.trigger.min_turn

    def _fresh_view(self, state: CacheState, k: Tensor, v: Tensor, step: Step) -> LayerView:
        b, h, t = k.shape[:3]
        positions = step.positions[:, None].expand(b, h, t)
        lengths = step.once(("counts", k.device), lambda: on_device(step.counts, k.device))[:, None].expand(b, h)
        view = self._view(state, k, v, positions, lengths, step.seen)
        view.known_seen = tuple((step.start + step.counts).tolist())
        view.known_lengths = np.repeat(step.counts[:, None], h, axis=1)
        view.shared = step.once(("views", h, k.device), dict)
        return view

    def stored_view(self, state: CacheState) -> LayerView:
        """What parts see of the entries held between forward passes."""
        batch = 0 if self.store is None else self.store.batch
        return self._stored_view(state, state.columns.seen(batch))

    def _stored_view(self, state: CacheState, seen: Ints) -> LayerView:
        store = self.store
        if store is None:
            raise CacheStateError("this layer has no entries yet.")
        lengths, read = on_device(store.lengths, store.device), store.read()
        view = self._view(state, read.keys, read.values, store.positions(), lengths, on_device(seen, store.device))
        view.known_seen, view.known_lengths = tuple(seen.tolist()), store.lengths
        names = [name for name in received.plane_names(state.observes) if name in store.pool.planes]
        received.show(view, state.observes, {name: store.plane(name) for name in names})
        view.bias = store.mass()
        return view

    def _view(
        self, state: CacheState, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, seen: Tensor
    ) -> LayerView:
        return LayerView(
            layer=self.index,
            layers=state.layer_count,
            keys=k,
            values=v,
            positions=positions,
            lengths=lengths,
            seen=seen,
            scale=self.scale,
            group=self.group,
            queries=None if self.window is None else self.window.queries,
            query_positions=None if self.window is None else self.window.positions,
            moments=None if self.statistics is None else self.statistics.moments,
            numbers=state.numbers,
            second_pass=self.second_pass,
            segments=None if state.segments is None else state.segments.to(k.device),
            prompt=None if state.prompt is None or not state.needs.prompt else on_device(state.prompt, k.device),
        )

    def _ask(self, state: CacheState, view: LayerView, facts: ModuleFacts) -> None:
        """Ask the module for what the recipe declares and only it can tell."""
        if state.needs.output_weight:
            view.output_weight = facts.output_weight()
        if state.needs.rope:
            view.rope = self.turn_by(state, facts)

    def turn_by(self, state: CacheState, facts: ModuleFacts) -> Rope:
        """The rotary embedding, which the module is asked for once."""
        if self.rope is None:
            told = facts.rope()
            device = told.inv_freq.device if self.store is None else self.store.device
            self.rope, self.owns_rope = state.shared_rope(told, device)
        return self.rope

    def _observe(self, state: CacheState, q: Tensor, step: Step, facts: ModuleFacts) -> None:
        if self.whole:
            return
        if state.observes.window:
            if self.window is None:
                self.window = QueryWindow(state.observes.window)
            self.window.see(q, step, spare=step.length if self._short(state, step) else 0)
        if state.observes.moments:
            if self.statistics is None:
                self.statistics = QueryStatistics(state.observes.moments_after)
            self.statistics.see(q, step, self.turn_by(state, facts))


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
