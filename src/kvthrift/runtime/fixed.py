"""Decode steps that need nothing from the host: pages are there, lengths and positions live on the device.

Such a step can be recorded as a CUDA graph and replayed; afterwards the host is told how many there were. Knows no
model library and no graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.errors import CacheStateError
from kvthrift.kernels import ReadPlan, paged_append, paged_attend, plan_read

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache
    from kvthrift.runtime.state import CacheState


class FixedSteps:
    """Up to ``room`` decode steps of a cache, one token a sequence each.

    Use it as a context: within, every pass through the cache is such a step, and the caller adds one to ``positions``
    after each. Nothing else may be done with the cache meanwhile, and whether layers are visited in order is not
    checked. On leaving, :attr:`taken` steps are counted on the host.

    Args:
        state: a cache that has read its prompt.
        room: steps for which pages are taken now.

    Raises:
        CacheStateError: the cache is empty, or a pass failed half way.
    """

    def __init__(self, state: CacheState, room: int) -> None:
        if state.broken or any(layer.store is None for layer in state.layers):
            raise CacheStateError("steps of fixed room go on from a prompt that was read whole.")
        self.state = state
        self.room = room
        self.taken = 0
        stores = [layer.store for layer in state.layers if layer.store is not None]
        for store in stores:
            store.make_room(room)
        device = stores[0].device
        self.positions = torch.from_numpy(state.columns.seen(stores[0].batch)).to(device)
        self._plans: dict[tuple[int, ...], ReadPlan] = {}
        self._pages = [store.paged() for store in stores]
        self._known = [paged.lengths.clone() for paged in self._pages]
        self._settled = False
        self._tails = [[t.clone() for t in (p.keys, p.values)] if p.coded else [] for p in self._pages]

    def __enter__(self) -> FixedSteps:
        self.state.fixed = self
        return self

    def __exit__(self, *_: object) -> None:
        self.state.fixed = None
        self.state.columns.grow(len(self.positions), self.taken)
        for layer in self.state.layers:
            layer.since += self.taken
            if layer.store is not None:
                layer.store.grown(self.taken)
        self.taken = 0

    @property
    def bytes(self) -> int:
        """Bytes of the scratch that all layers share, and of what :meth:`restart` needs."""
        return sum(plan.bytes for plan in self._plans.values()) + sum(t.nbytes for pair in self._tails for t in pair)

    def restart(self) -> None:
        """Take back every step since this was made, so that trial runs leave no trace.

        Raises:
            CacheStateError: :meth:`settle` was called, and pages in few bits may have been written since.
        """
        if self._settled:
            raise CacheStateError("steps cannot be taken back any more, since settle() gave back what that needs.")
        for paged, known, tail in zip(self._pages, self._known, self._tails, strict=True):
            paged.lengths.copy_(known)
            if tail:
                paged.keys.copy_(tail[0])
                paged.values.copy_(tail[1])
        self.positions.copy_(torch.from_numpy(self.state.columns.seen(len(self.positions))))

    def settle(self) -> None:
        """Give back what :meth:`restart` needs; from here on no step is taken back."""
        self._tails, self._settled = [], True

    def attend(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One layer's part of a step: append, then attend; see :meth:`LayerCache.attend`."""
        store = layer.store
        if store is None or q.shape[2] != 1:
            raise CacheStateError("a step of fixed room is one token for every sequence.")
        paged = store.paged()
        rows = len(paged.lengths)
        pages = int((-(-(store.lengths + self.room) // store.page)).sum())
        key = (rows, pages, q.shape[0] * q.shape[1] // rows, v.shape[-1])
        even = store.uniform  # and stays so: every row grows by one a step
        if (*key, even) not in self._plans:
            self._plans[*key, even] = plan_read(*key, q.device, even=even)
        paged_append(k, v, self.positions, paged)
        return paged_attend(q, paged, scale=scale, plan=self._plans[*key, even]).out
