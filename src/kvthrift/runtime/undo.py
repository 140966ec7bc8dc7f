"""A short pass whose end may be taken back: what observations were before it, so that the rest can be added anew.

Rejected candidates of a speculation then leave nothing in sums of attention and moments of queries, as if they had
never been read. Only the newest pass can be undone, and no padded one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvthrift.core import QueryMoments
from kvthrift.runtime import received
from kvthrift.runtime.step import Step

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache
    from kvthrift.runtime.state import CacheState


@dataclass(frozen=True)
class Undo:
    """One layer's part of a short pass behind entries that were there.

    Attributes:
        q: ``[B, HG, Q, D]``; lse: ``[B, HG, Q]`` over all they saw.
        step: the pass's columns, none of them padding.
        planes: ``[B, H, T]`` by name, before the pass.
        moments: before the pass.
    """

    q: Tensor
    lse: Tensor | None
    step: Step
    planes: dict[str, Tensor] = field(default_factory=dict)
    moments: QueryMoments | None = None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        sums = () if self.moments is None else (self.moments.count, self.moments.total, self.moments.outer)
        return sum(t.nbytes for t in (self.q, *self.planes.values(), *sums))

    def keep(self, state: CacheState, layer: LayerCache, limits: Tensor) -> None:
        """Let a layer's observations be as if only what is before ``limits [B]`` had been read.

        Its store has gone back already.
        """
        store, step = layer.store, self.step
        kept = int((limits.cpu().numpy() - step.start).clip(0, step.length).max(initial=0))
        if store is None or kept == step.length:
            return
        counts = np.full_like(step.counts, kept)
        part = Step(kept, counts, step.start, None, step.device)
        planes = {name: plane[..., : store.longest] for name, plane in self.planes.items()}
        if kept and planes and self.lse is not None:
            view = layer.stored_view(state)
            more = received.of_pass(state.observes, view, self.q[:, :, :kept], self.lse[..., :kept], part)
            planes = {name: plane + more[name] for name, plane in planes.items()}
        for name, plane in planes.items():
            store.write(name, plane)
        if layer.statistics is not None:
            layer.statistics.moments = self.moments
            if kept and layer.rope is not None:
                layer.statistics.see(self.q[:, :, :kept], part, layer.rope)
