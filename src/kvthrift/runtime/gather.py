"""What parts will ask of the queries of steps of fixed room, gathered by each step itself in memory that stays put.

The newest queries are a ring that a step writes to at a place counted on the device; moments and the sums that entries
receive are added to. Afterwards a layer's observations are what ordinary steps would have left. Knows no graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.core import LayerShape, ModuleFacts, QueryMoments
from kvthrift.errors import CacheStateError
from kvthrift.runtime import received
from kvthrift.runtime.observe import QueryStatistics, QueryWindow
from kvthrift.runtime.step import Step

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache
    from kvthrift.runtime.state import CacheState
    from kvthrift.store import LayerStore


def obstacle(state: CacheState) -> str | None:
    """Why what this cache's recipe looks at while it decodes cannot be gathered without the host; None if it can."""
    coded = any(layer.store is not None and layer.store.form is not None for layer in state.layers)
    if state.recipe.trigger.every is not None and received.plane_names(state.observes) and coded:
        return "sums of attention over pages in few bits are taken with the host's help"
    return None


class QueryRing:
    """The newest queries of every sequence, each at the place of its turn.

    Args:
        window: what was seen so far; left as it is until :meth:`give_back`.
        batch: sequences.
        shape, dtype, device: of the layer.

    Attributes:
        queries: ``[B, HG, W, D]``; positions: ``[B, W]`` int64, -1 where there is none.
    """

    def __init__(
        self, window: QueryWindow, batch: int, shape: LayerShape, dtype: torch.dtype, device: torch.device
    ) -> None:
        size, self.window = window.size, window
        with torch.inference_mode(False):
            self.queries = torch.zeros(batch, shape.query_heads, size, shape.key_dim, dtype=dtype, device=device)
            self.positions = torch.full((batch, size), -1, dtype=torch.int64, device=device)
        self.known = 0 if window.positions is None else window.positions.shape[1]
        if window.queries is not None and window.positions is not None:
            self.queries[:, :, size - self.known :] = window.queries
            self.positions[:, size - self.known :] = window.positions

    def put(self, q: Tensor, step: Step, turn: Tensor) -> None:
        """Take in queries ``[B, HG, 1, D]`` of step number ``turn [1]`` in place of the oldest."""
        size = self.queries.shape[2]
        place = step.once(("place", size), lambda: turn % size)
        self.queries.index_copy_(2, place, q.to(self.queries.dtype))
        self.positions.index_copy_(1, place, step.positions)

    def give_back(self, taken: int) -> None:
        """Let the window hold what it would after ``taken`` ordinary steps."""
        size = self.queries.shape[2]
        order = (torch.arange(size, device=self.queries.device) + taken) % size
        order = order[-min(size, self.known + taken) :]
        self.window.hold(self.queries.index_select(2, order), self.positions.index_select(1, order))


class Gathering:
    """What one layer gathers in steps of fixed room.

    Args:
        state: the cache; layer: one of its layers that is not whole, with entries.
    """

    def __init__(self, state: CacheState, layer: LayerCache, store: LayerStore) -> None:
        self.layer, self.store = layer, store
        self.observes, self.planes = state.observes, received.plane_names(state.observes)
        self.ring: QueryRing | None = None
        self.sums: QueryMoments | None = None
        if self.observes.window:
            layer.window = layer.window or QueryWindow(self.observes.window)
            self.ring = QueryRing(layer.window, store.batch, store.shape, store.dtype, store.device)
        if self.observes.moments:
            layer.statistics = layer.statistics or QueryStatistics(self.observes.moments_after)
            self.sums = _own(layer.statistics.moments, store)
        if self.planes:
            store.own()

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that a step writes to."""
        ring = [] if self.ring is None else [self.ring.queries, self.ring.positions]
        sums = [] if self.sums is None else [self.sums.count, self.sums.total, self.sums.outer]
        return [*ring, *sums, *(self.store.pool.planes[name] for name in self.planes)]

    @property
    def bytes(self) -> int:
        """Bytes of what is the steps' own."""
        return sum(t.nbytes for t in self.written[: len(self.written) - len(self.planes)])

    def see(self, state: CacheState, q: Tensor, step: Step, turn: Tensor, facts: ModuleFacts) -> None:
        """Take in the queries ``[B, HG, 1, D]`` of one step, whose own entry is stored already."""
        if self.ring is not None:
            self.ring.put(q, step, turn)
        if self.sums is not None and self.layer.statistics is not None:
            more = self.layer.statistics.of_pass(q, step, self.layer.turn_by(state, facts))
            for mine, part in zip(_parts(self.sums), _parts(more), strict=True):
                mine.add_(part)
        if self.planes:
            found = received.of_step(self.observes, self.store.places(), q, step.positions, self.layer.scale)
            for name, received_now in found.items():
                self.store.add(name, received_now)

    def give_back(self, taken: int) -> None:
        """Let the layer's observations be what ``taken`` ordinary steps would have left."""
        if self.ring is not None:
            self.ring.give_back(taken)
        if self.sums is not None and self.layer.statistics is not None:
            self.layer.statistics.moments = QueryMoments(*(part.clone() for part in _parts(self.sums)))


def _parts(sums: QueryMoments) -> tuple[Tensor, Tensor, Tensor]:
    return sums.count, sums.total, sums.outer


def _own(sums: QueryMoments | None, store: LayerStore) -> QueryMoments:
    """The same sums in tensors of our own that may be written to in and out of inference mode."""
    batch, heads, dim = store.batch, store.shape.query_heads, store.shape.key_dim
    with torch.inference_mode(False):
        out = [torch.zeros(batch, *shape, device=store.device) for shape in ((), (heads, dim), (heads, dim, dim))]
    if sums is not None:
        for mine, part in zip(out, _parts(sums), strict=True):
            mine.copy_(part)
    return QueryMoments(*out)


def check(state: CacheState, room: int) -> None:
    """Refuse steps of fixed room that would not leave what ordinary steps do.

    Raises:
        CacheStateError: decoded tokens would have to be compressed before ``room`` steps are taken, or gathering needs
            the host.
    """
    why, due = obstacle(state), state.until_due
    if why is not None:
        raise CacheStateError(f"{why}, which steps of fixed room do without. Take ordinary steps.")
    if due is not None and room > due:
        raise CacheStateError(
            f"room for {room} steps goes beyond the next compression, which is due in {due}. Ask for at most that."
        )
