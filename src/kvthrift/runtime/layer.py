"""One layer of a cache: takes new queries, keys and values, gives back attention, keeps what the recipe says.

New tokens attend to the store (without a mask: all of it is past) and to each other (causally); the two are merged by
log-sum-exp. Knows no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import LayerShape, LayerView, ModuleFacts, Rope, SecondPass
from kvthrift.errors import CacheStateError, ModelMismatchError
from kvthrift.kernels.codes import Format
from kvthrift.runtime import received
from kvthrift.runtime.compress import Foretold, Kept, check_floor, choose, everything, foretell, gather
from kvthrift.runtime.observe import QueryStatistics, QueryWindow
from kvthrift.runtime.step import Bools, Ints, Step
from kvthrift.store import LayerStore, on_device

if TYPE_CHECKING:
    from kvthrift.runtime.state import CacheState


class LayerCache:
    """The cache of one attention layer.

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
        self.second_pass: dict[SecondPass, Tensor] = {}  # [B, H, T] each, of a context that is whole
        self.chosen: tuple[Tensor, Foretold | None] | None = None  # by the last compression, for layers that reuse it

    # -- one forward pass ----------------------------------------------------------------------------------------

    def attend(
        self, state: CacheState, q: Tensor, k: Tensor, v: Tensor, *, scale: float, step: Step, facts: ModuleFacts
    ) -> Tensor:
        """Attention of new tokens over everything kept and each other; then keep what the recipe says.

        Args:
            state: the cache this layer belongs to.
            q: ``[B, HG, Q, Dk]`` post-RoPE; k, v: ``[B, H, Q, Dk]``, ``[B, H, Q, Dv]``.
            scale: softmax scale.
            step: this pass's columns.
            facts: what only the model's module can tell.

        Returns:
            ``[B, HG, Q, Dv]``; padding gets zeros.
        """
        self.scale, self.group = scale, q.shape[1] // k.shape[1]
        store = self.store if self.store is not None else self.store_for(state, q, k, v)
        if state.look is not None:
            return state.look.attend(state.layers.index(self), self, q, k, v, scale)
        if state.due(self) and store.longest and state.recipe.layers.scope != "joint":
            self._compress(state, self.stored_view(state), facts)
        if step.length == 1 and not step.padded:
            return self._decode(state, store, q, k, v, step, facts)
        q, k, v = step.pack(q), step.pack(k), step.pack(v)
        past = store.longest > 0
        own = kernels.attend(q, k, v, scale=scale, causal=True, need_lse=past or self._counts(state))
        if past:
            view = store.read()
            if store.form is not None:
                state.meter.saw(state.held_by(self) + _bytes(k, v, view.keys, view.values))
            stored = kernels.attend(
                q, view.keys, view.values, scale=scale, bias=view.bias, lengths=view.lengths, need_lse=True
            )
            own = kernels.merge((stored, own))
        self._observe(state, q, step, facts)
        self._take_in(state, store, q, k, v, own.lse, step, facts)
        return step.unpack(own.out)

    def _decode(
        self, state: CacheState, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, step: Step, facts: ModuleFacts
    ) -> Tensor:
        store.append(k, v, step.positions)
        self.since += 1
        # where nothing has gone: be bit for bit what sdpa is
        whole = store.form is None and store.longest == int(step.start.max()) + 1
        if store.unfit is None and not whole:
            out = kernels.paged_attend(q, store.paged(), scale=self.scale).out
        else:
            view = store.read()
            out = kernels.attend(q, view.keys, view.values, scale=self.scale, bias=view.bias, verbatim=whole).out
        if not self.whole and state.recipe.trigger.every is not None:
            self._observe(state, q, step, facts)
            if self._counts(state):
                for name, more in received.of_step(state.observes, store, q, step, self.scale).items():
                    store.write(name, store.plane(name) + more)
        return out

    def _take_in(
        self, state: CacheState, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, step: Step,
        facts: ModuleFacts,
    ) -> None:  # fmt: skip
        """Append a pass over several tokens, compressing if it is a prompt."""
        fires = state.is_prompt(step) and not self.whole
        if fires and state.recipe.layers.scope == "joint":
            fires = state.postpone()
        planes: dict[str, Tensor] = {}
        if not store.longest:
            view = self._fresh_view(state, k, v, step)
            if self._counts(state):
                planes = received.of_pass(state.observes, view, q, lse, step)
                received.show(view, state.observes, planes)
            state.meter.saw(state.held_by(self) + _bytes(k, v))
            if fires and self._compress(state, view, facts):
                return
            fires = False
        store.append(k, v, step.positions, counts=step.counts if step.padded else None, planes=planes)
        self.since += step.length
        state.meter.saw(state.held_by(self) + _bytes(k, v) * (1 if store.form is None else 2))
        seen = step.start + step.counts
        if self._counts(state) and not planes:
            view = self._stored_view(state, seen)
            for name, more in received.of_pass(state.observes, view, q, lse, step).items():
                store.write(name, store.plane(name) + more)
        if fires:
            self._compress(state, self._stored_view(state, seen), facts)

    def _counts(self, state: CacheState) -> bool:
        return bool(received.plane_names(state.observes)) and not self.whole

    # -- compression ---------------------------------------------------------------------------------------------

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
            planes = self._planes(state, view)
            keep, foretold, scores = self._choose(state, view, rooms, whole)
            self.chosen = (keep, foretold) if recipe.reuse > 1 else None
            if recipe.layers.scope != "model" and everything(keep, view, foretold):
                return False
            state.meter.compressions += 1
            if scores is not None and recipe.layers.scope == "model":
                planes["score"] = scores.clamp(min=torch.finfo(torch.float32).min)
            kept = gather(recipe, view, keep, scores, planes, foretold)
            copied = 0 if _same(view.keys, store.pool.keys) else _bytes(view.keys, view.values)
            state.meter.saw(state.held_by(self) + copied + 2 * _bytes(kept.keys, kept.values))
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
        foretold = None if isinstance(totals, Tensor) else foretell(recipe, view, totals, whole)
        known = None if foretold is None else foretold.lengths
        per_head = totals if isinstance(totals, Tensor) else on_device(totals, scores.device)
        keep = choose(recipe, view, scores, per_head, known)
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
        keep = torch.where(fits[:, None, None], view.valid, choose(state.recipe, view, scores, counts))
        if torch.equal(keep, view.valid):
            return
        state.meter.compressions += 1
        kept = gather(state.recipe, view, keep, scores, self._planes(state, view))
        state.meter.saw(state.held_by(self) + 2 * _bytes(kept.keys, kept.values))
        self._hold(state, kept)

    def cut(self, state: CacheState, per_head: Ints) -> None:
        """Cut an already compressed layer further, by the scores it was compressed with; ``per_head [B]``."""
        store = self.store
        if store is None or "score" not in store.pool.planes:
            return
        view = self._stored_view(state, state.current_seen(store.batch))
        fits = store.lengths.sum(axis=1) <= per_head * store.shape.kv_heads
        if fits.all():
            return
        view.rope = self.rope
        recipe = state.recipe.with_options(refine=None)
        scores = store.plane("score")
        planes = {name: store.plane(name) for name in store.pool.planes}
        foretold = foretell(recipe, view, per_head, fits)
        known = None if foretold is None else foretold.lengths
        keep = choose(recipe, view, scores, on_device(per_head, scores.device), known)
        keep = torch.where(on_device(fits, keep.device)[:, None, None], view.valid, keep)
        self._hold(state, gather(recipe, view, keep, scores if recipe.merge.biased else None, planes, foretold))

    def form(self, state: CacheState) -> Format | None:
        """How this layer's full pages are to be written; None for as they are."""
        return None if state.recipe.codec is None or self.whole else state.recipe.codec.format

    def rewrite(self, state: CacheState) -> None:
        """Write what is held as the recipe says, if that had to wait."""
        if self.store is not None:
            self.store.rewrite(self.form(state))

    def _hold(self, state: CacheState, kept: Kept) -> None:
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

    # -- views and signals ---------------------------------------------------------------------------------------

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
        )

    def _ask(self, state: CacheState, view: LayerView, facts: ModuleFacts) -> None:
        """Ask the module for what the recipe declares and only it can tell."""
        if state.needs.output_weight:
            view.output_weight = facts.output_weight()
        if state.needs.rope:
            if self.rope is None:
                self.rope, self.owns_rope = state.shared_rope(facts.rope(), view.keys.device)
            view.rope = self.rope

    def _observe(self, state: CacheState, q: Tensor, step: Step, facts: ModuleFacts) -> None:
        if self.whole:
            return
        if state.observes.window:
            if self.window is None:
                self.window = QueryWindow(state.observes.window)
            self.window.see(q, step)
        if state.observes.moments:
            if self.statistics is None:
                self.statistics = QueryStatistics(state.observes.moments_after)
            if self.rope is None:
                self.rope, self.owns_rope = state.shared_rope(facts.rope(), q.device)
            self.statistics.see(q, step, self.rope)

    # -- keeping house -------------------------------------------------------------------------------------------

    def store_for(self, state: CacheState, q: Tensor, k: Tensor, v: Tensor) -> LayerStore:
        """The store that takes such keys and values in.

        Raises:
            ModelMismatchError: it holds another batch, other heads or another dtype.
        """
        shape = LayerShape(k.shape[1], q.shape[1], k.shape[-1], v.shape[-1])
        if self.store is None:
            planes = received.plane_names(state.observes) if self._counts(state) else ()
            form = self.form(state) if state.early else None
            self.store = LayerStore(shape, k.shape[0], k.dtype, k.device, page=state.page, planes=planes, form=form)
        store = self.store
        if store.shape != shape or store.batch != k.shape[0] or store.dtype != k.dtype:
            raise ModelMismatchError(
                f"layer {self.number} of this cache holds {store.batch} sequences of {store.shape} in "
                f"{store.dtype}, but the model brings {k.shape[0]} of {shape} in {k.dtype}. Use the "
                "cache with the model and batch it was made for."
            )
        return store

    def settle(self, *, keep_observations: bool) -> None:
        """Give back what later passes do not need: stored scores, and observations unless asked to keep them."""
        if self.store is not None:
            self.store.forget(("score",))
        if not keep_observations:
            self.window = self.statistics = None
            self.second_pass = {}

    @property
    def bytes(self) -> int:
        """Bytes held: store, observations, and what the module told."""
        held = self.store.bytes if self.store is not None else 0
        held += 0 if self.rope is None or not self.owns_rope else _bytes(self.rope.inv_freq)
        held += _bytes(*self.second_pass.values())
        return held + sum(part.bytes for part in (self.window, self.statistics) if part is not None)

    def rewind(self, limits: Tensor) -> None:
        """Forget every token at position ``limits [B]`` or later."""
        if self.store is not None:
            self.store.rewind(limits)
            self.second_pass = {wanted: x[..., : self.store.longest] for wanted, x in self.second_pass.items()}
        if self.window is not None:
            self.window.rewind(limits)

    def fork(self) -> LayerCache:
        """Another layer with the same entries, sharing pages until one side writes to them."""
        other = LayerCache(self.index, self.number, whole=self.whole)
        other.store = None if self.store is None else self.store.fork()
        other.scale, other.group, other.since = self.scale, self.group, self.since
        other.rope, other.owns_rope = self.rope, self.owns_rope
        other.window = None if self.window is None else self.window.fork()
        other.statistics = None if self.statistics is None else self.statistics.fork()
        other.second_pass = dict(self.second_pass)
        return other


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
