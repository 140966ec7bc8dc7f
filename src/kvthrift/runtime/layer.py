"""One layer of a cache: takes new queries, keys and values, gives back attention, keeps what the recipe says.

New tokens attend to the store (without a mask: all of it is past) and to each other (causally); the two are merged by
log-sum-exp. A few tokens are appended first, where kernels read pages in their place, and then all is one read. Knows
no model library.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from kvthrift import kernels
from kvthrift.core import AttentionOutput, LayerShape, ModuleFacts
from kvthrift.errors import ModelMismatchError
from kvthrift.runtime import received
from kvthrift.runtime.cuts import LayerCuts
from kvthrift.runtime.step import Step
from kvthrift.runtime.undo import Undo
from kvthrift.runtime.views import nbytes
from kvthrift.store import LayerStore

if TYPE_CHECKING:
    from kvthrift.runtime.state import CacheState

FEW = 16  # tokens of a pass whose queries one read of the pages takes together


class LayerCache(LayerCuts):
    """The cache of one attention layer; arguments as for :class:`LayerViews`."""

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
        self.scale, self.group, self.undo = scale, q.shape[1] // k.shape[1], None
        store = self.store if self.store is not None else self.store_for(state, q, k, v)
        if state.look is not None:
            return state.look.attend(state.layers.index(self), self, q, k, v, scale)
        if state.due(self) and store.longest and state.recipe.layers.scope != "joint":
            self._compress(state, self.stored_view(state), facts)
        if step.length == 1 and not step.padded:
            return self._decode(state, store, q, k, v, step, facts)
        q, k, v = step.pack(q), step.pack(k), step.pack(v)
        fires = self._fires(state, step)
        if not store.longest:
            own = kernels.attend(q, k, v, scale=scale, causal=True, need_lse=self._counts(state))
            self._observe(state, q, step, facts)
            self._take_in_first(state, store, q, k, v, own.lse, step, facts, fires)
        else:
            few = step.length <= FEW and store.unfit is None
            own = (self._read_few if few else self._read_all)(state, store, q, k, v, step)
            self._remember(state, store, q, own.lse, step)
            self._observe(state, q, step, facts)
            self._count_in(state, store, q, own.lse, step)
            if fires:
                self._compress(state, self._stored_view(state, step.start + step.counts), facts)
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
                more_of = received.of_step(state.observes, store.held(), q, step.positions, self.scale)
                for name, more in more_of.items():
                    store.write(name, store.plane(name) + more)
        return out

    def _read_all(
        self, state: CacheState, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> AttentionOutput:
        """Attend to everything stored and causally to what is new, then append that."""
        own = kernels.attend(q, k, v, scale=self.scale, causal=True, need_lse=True)
        view = store.read()
        if store.form is not None:
            state.meter.saw(state.held_by(self) + nbytes(k, v, view.keys, view.values))
        stored = kernels.attend(
            q, view.keys, view.values, scale=self.scale, bias=view.bias, lengths=view.lengths, need_lse=True
        )
        own = kernels.merge((stored, own))
        del view  # before the pages grow
        self._append(state, store, k, v, step)
        return own

    def _read_few(
        self, state: CacheState, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> AttentionOutput:
        """The same of at most :data:`FEW` tokens, from the pages where they lie."""
        if store.form is None and not step.padded:
            self._append(state, store, k, v, step)
            return kernels.paged_attend(q, store.paged(), scale=self.scale, causal=True)
        # rows end at places of their own, or the newest page may be written in few bits when these are appended
        stored = kernels.paged_attend(q, store.paged(), scale=self.scale)
        own = kernels.merge((stored, kernels.attend(q, k, v, scale=self.scale, causal=True, need_lse=True)))
        self._append(state, store, k, v, step)
        return own

    def _fires(self, state: CacheState, step: Step) -> bool:
        """Whether this pass ends with a compression of this layer."""
        fires = state.is_prompt(step) and not self.whole
        return state.postpone() if fires and state.recipe.layers.scope == "joint" else fires

    def _take_in_first(
        self, state: CacheState, store: LayerStore, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, step: Step,
        facts: ModuleFacts, fires: bool,
    ) -> None:  # fmt: skip
        """Store what there is of a first pass once it is compressed, or all of it."""
        view, planes = self._fresh_view(state, k, v, step), dict[str, Tensor]()
        if self._counts(state):
            planes = received.of_pass(state.observes, view, q, lse, step)
            received.show(view, state.observes, planes)
        state.meter.saw(state.held_by(self) + nbytes(k, v))
        if not (fires and self._compress(state, view, facts)):
            self._append(state, store, k, v, step, planes)

    def _append(
        self, state: CacheState, store: LayerStore, k: Tensor, v: Tensor, step: Step,
        planes: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        store.append(k, v, step.positions, counts=step.counts if step.padded else None, planes=planes)
        self.since += step.length
        state.meter.saw(state.held_by(self) + nbytes(k, v) * (1 if store.form is None else 2))

    def _remember(self, state: CacheState, store: LayerStore, q: Tensor, lse: Tensor | None, step: Step) -> None:
        """Note what observations are before they take in a short pass, of which some tokens may be taken back."""
        counts, moments = self._counts(state), None if self.statistics is None else self.statistics.moments
        if step.padded or self.whole or not self._short(state, step) or not (counts or moments):
            return
        names = received.plane_names(state.observes) if counts else ()
        self.undo = Undo(q, lse, step, {name: store.plane(name).clone() for name in names}, moments)

    def _count_in(self, state: CacheState, store: LayerStore, q: Tensor, lse: Tensor | None, step: Step) -> None:
        """Add what entries received from a pass over several tokens, its own among them."""
        if self._counts(state):
            view = self._stored_view(state, step.start + step.counts)
            for name, more in received.of_pass(state.observes, view, q, lse, step).items():
                store.write(name, store.plane(name) + more)

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
            self.undo = replace(self.undo, moments=None) if self.undo is not None and self.undo.planes else None
            self.second_pass = {}

    def rewind(self, state: CacheState, limits: Tensor) -> None:
        """Forget every token at position ``limits [B]`` or later."""
        if self.store is not None:
            self.store.rewind(limits)
            self.second_pass = {wanted: x[..., : self.store.longest] for wanted, x in self.second_pass.items()}
        if self.window is not None:
            self.window.rewind(limits)
        if self.undo is not None:
            self.undo.keep(state, self, limits)
        self.undo = None

    def fork(self) -> LayerCache:
        """Another layer with the same entries, sharing pages until one side writes to them."""
        other = LayerCache(self.index, self.number, whole=self.whole)
        other.store = None if self.store is None else self.store.fork()
        other.scale, other.group, other.since = self.scale, self.group, self.since
        other.rope, other.owns_rope = self.rope, self.owns_rope
        other.window = None if self.window is None else self.window.fork()
        other.statistics = None if self.statistics is None else self.statistics.fork()
        other.second_pass, other.undo = dict(self.second_pass), self.undo
        return other
