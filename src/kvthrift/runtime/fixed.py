"""Decode steps that need nothing from the host: pages are there, lengths and positions live on the device.

Such a step can be recorded as a CUDA graph and replayed; afterwards the host is told how many there were. What a recipe
looks at while tokens are decoded is gathered by the steps themselves (``gather.py``). Knows no model library and no
graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import ModuleFacts
from kvthrift.errors import CacheStateError
from kvthrift.kernels import Paged, ReadPlan, paged_append, paged_attend
from kvthrift.kernels.plan import Cut, cut_read, multiprocessors, with_scratch
from kvthrift.runtime.gather import Gathering, check
from kvthrift.runtime.step import Step

if TYPE_CHECKING:
    from kvthrift.runtime.state import CacheState
    from kvthrift.store import LayerStore


class FixedSteps:
    """Up to ``room`` decode steps of a cache, one token a sequence each.

    Use it as a context: within, every pass through the cache is such a step, and the caller adds one to ``positions``
    after each. Nothing else may be done with the cache meanwhile, and whether layers are visited in order is not
    checked. On leaving, :attr:`taken` steps are counted on the host.

    Args:
        state: a cache that has read its prompt.
        room: steps for which pages are taken now.

    Raises:
        CacheStateError: the cache is empty, or a pass failed half way; or decoded tokens are to be compressed before
            ``room`` of them are there, or by what the host has to help with.
    """

    def __init__(self, state: CacheState, room: int) -> None:
        if state.broken or any(layer.store is None for layer in state.layers):
            raise CacheStateError("steps of fixed room go on from a prompt that was read whole.")
        check(state, room)
        self.state = state
        self.room = room
        self.taken = 0
        stores = [layer.store for layer in state.layers if layer.store is not None]
        for store in stores:
            store.make_room(room)
        for layer in state.layers:
            layer.undo = None
        self._start = state.columns.seen(stores[0].batch)
        self.positions = torch.from_numpy(self._start).to(stores[0].device)
        self._first = self.positions.clone()
        self._before = 0  # steps that the host was told of
        self._step: Step | None = None
        self._turn: Tensor | None = None  # [1] number of the step under way
        self._plans: dict[tuple[int, int, int, Cut], ReadPlan] = {}
        self._gathered = self._gathering()
        self._written = [self.positions, *(t for parts in self._gathered.values() for t in parts.written)]
        for paged in (store.paged() for store in stores):
            self._written += [paged.lengths, *((paged.keys, paged.values) if paged.coded else ())]
        self._known = [t.clone() for t in self._written]
        self._settled = False

    def _gathering(self) -> dict[int, Gathering]:
        """What layers gather, by place: nothing where decoded tokens are never compressed."""
        if self.state.recipe.trigger.every is None:
            return {}
        layers = enumerate(self.state.layers)
        return {n: Gathering(self.state, x, x.store) for n, x in layers if not x.whole and x.store is not None}

    def __enter__(self) -> FixedSteps:
        self.state.fixed = self
        return self

    def __exit__(self, *_: object) -> None:
        self.state.fixed = None
        self._before += self.taken
        self.state.columns.grow(len(self.positions), self.taken)
        for layer in self.state.layers:
            layer.since += self.taken
            if layer.store is not None:
                layer.store.grown(self.taken)
        if self.taken:
            for parts in self._gathered.values():
                parts.give_back(self._before)
        self.taken = 0

    @property
    def bytes(self) -> int:
        """Bytes of the scratch that all layers share, of what is gathered, and of what :meth:`restart` needs."""
        gathered = sum(parts.bytes for parts in self._gathered.values())
        return sum(plan.bytes for plan in self._plans.values()) + gathered + sum(t.nbytes for t in self._known)

    def restart(self) -> None:
        """Take back every step since this was made, so that trial runs leave no trace.

        Raises:
            CacheStateError: :meth:`settle` was called, and pages in few bits may have been written since.
        """
        if self._settled:
            raise CacheStateError("steps cannot be taken back any more, since settle() gave back what that needs.")
        for written, known in zip(self._written, self._known, strict=True):
            written.copy_(known)

    def settle(self) -> None:
        """Give back what :meth:`restart` needs; from here on no step is taken back."""
        self._known, self._written, self._settled = [], [], True

    def attend(self, place: int, q: Tensor, k: Tensor, v: Tensor, scale: float, facts: ModuleFacts) -> Tensor:
        """One layer's part of a step: append, then attend; see :meth:`LayerCache.attend`."""
        layer = self.state.layers[place]
        store = layer.store
        if store is None or q.shape[2] != 1:
            raise CacheStateError("a step of fixed room is one token for every sequence.")
        paged = store.paged()
        paged_append(k, v, self.positions, paged)
        out = paged_attend(q, paged, scale=scale, plan=self._plan(store, paged, q, v)).out
        if place in self._gathered:
            step, turn = self._now(place)
            self._gathered[place].see(self.state, q, step, turn, facts)
        return out

    def _plan(self, store: LayerStore, paged: Paged, q: Tensor, v: Tensor) -> ReadPlan:
        """For as many pages as there are half way through; layers that are cut alike share the scratch."""
        rows, width = len(paged.lengths), v.shape[-1]
        queries = q.shape[0] * q.shape[1] // rows
        pages = int((-(-(store.lengths + self.room // 2) // store.page)).sum())
        even, coded = store.uniform, paged.coded is not None  # and stay so: every row grows by one a step
        cut = cut_read(rows, pages, queries, width, multiprocessors(q.device), even=even, coded=coded)
        key = (rows, queries, width, cut)
        if key not in self._plans:
            self._plans[key] = with_scratch(cut, rows, queries, width, q.device)
        return self._plans[key]

    def _now(self, place: int) -> tuple[Step, Tensor]:
        """The step under way, and its number ``[1]``, as the device knows them."""
        if self._step is None or self._turn is None or place == min(self._gathered):
            ones = np.ones(len(self.positions), dtype=np.int64)
            self._step = Step(1, ones, self._start, None, self.positions.device, at=self.positions[:, None])
            self._turn = self.positions[:1] - self._first[:1]
        return self._step, self._turn
