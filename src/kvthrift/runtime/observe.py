"""Signals that have to be gathered while the model runs: the newest queries, and moments of all queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import QueryMoments, Rope
from kvthrift.runtime.step import Ints, Step


class QueryWindow:
    """The newest queries of every sequence, and for a while those that they took the place of.

    ``queries [B, HG, W, D]`` post-RoPE and ``positions [B, W]`` int64, oldest first; position -1 where there is none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queries: Tensor | None = None  # [B, HG, W and more, D]
        self._positions: Tensor | None = None

    @property
    def queries(self) -> Tensor | None:
        """``[B, HG, W, D]``, or fewer."""
        return None if self._queries is None else self._queries[:, :, -self.size :]

    @property
    def positions(self) -> Tensor | None:
        """``[B, W]`` int64."""
        return None if self._positions is None else self._positions[:, -self.size :]

    def hold(self, queries: Tensor, positions: Tensor) -> None:
        """Have these queries and no others."""
        self._queries, self._positions = queries, positions

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self._queries, self._positions) if t is not None)

    def see(self, q: Tensor, step: Step, spare: int = 0) -> None:
        """Take in the packed queries ``[B, HG, length, D]`` of a pass, ``spare`` of which may be taken back."""
        positions = step.positions.masked_fill(~step.real, -1) if step.padded else step.positions
        if self.queries is not None and self.positions is not None:
            q = torch.cat((self.queries, q), dim=2)
            positions = torch.cat((self.positions, positions), dim=1)
        if step.padded:  # real ones to the right, in order
            order = (positions >= 0).long().argsort(dim=1, stable=True)
            positions = positions.gather(1, order)
            q = q.gather(2, order[:, None, :, None].expand(q.shape))
        kept = self.size + spare
        self.hold(q[:, :, -kept:].clone(), positions[:, -kept:].clone())

    def rewind(self, limits: Tensor) -> None:
        """Forget queries at position ``limits [B]`` or later."""
        queries, positions = self._queries, self._positions
        if positions is None or queries is None:
            return
        positions = positions.masked_fill(positions >= limits[:, None].to(positions.device), -1)
        order = (positions >= 0).long().argsort(dim=1, stable=True)
        self.hold(queries.gather(2, order[:, None, :, None].expand(queries.shape)), positions.gather(1, order))

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows`` of the present ones."""
        if self._queries is not None and self._positions is not None:
            index = torch.from_numpy(rows).to(self._queries.device)
            self.hold(self._queries[index], self._positions[index])

    def fork(self) -> QueryWindow:
        """An independent copy (tensors are never written in place)."""
        other = QueryWindow(self.size)
        other._queries, other._positions = self._queries, self._positions
        return other


class QueryStatistics:
    """Mean and covariance of pre-RoPE queries behind the first ``after`` tokens, as running sums in float32."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.moments: QueryMoments | None = None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        if self.moments is None:
            return 0
        return sum(t.numel() * 4 for t in (self.moments.count, self.moments.total, self.moments.outer))

    def see(self, q: Tensor, step: Step, rope: Rope) -> None:
        """Take in the packed post-RoPE queries ``[B, HG, length, D]`` of a pass."""
        more, old = self.of_pass(q, step, rope), self.moments
        if old is None:
            more.count = more.count.clone()  # each layer holds, and saves, its own
            self.moments = more
        else:
            self.moments = QueryMoments(old.count + more.count, old.total + more.total, old.outer + more.outer)

    def of_pass(self, q: Tensor, step: Step, rope: Rope) -> QueryMoments:
        """What these queries add; its count is shared by all layers of the pass."""
        use, count = step.once(("counting", self.after), lambda: self._counting(step))
        turns = step.once(("turns", rope), lambda: kernels.query_turns(q, step.positions, rope))
        return QueryMoments(count, *kernels.query_moments(q, step.positions, use, rope, turns))

    def _counting(self, step: Step) -> tuple[Tensor, Tensor]:
        """Which queries count, ``[B, length]`` bool, and how many, ``[B]`` float32."""
        use = step.positions >= self.after
        use = use & step.real if step.padded else use
        return use, use.sum(dim=1, dtype=torch.float32)

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows`` of the present ones."""
        if self.moments is not None:
            old, index = self.moments, torch.from_numpy(rows).to(self.moments.total.device)
            self.moments = QueryMoments(old.count[index], old.total[index], old.outer[index])

    def fork(self) -> QueryStatistics:
        """An independent copy (tensors are never written in place)."""
        other = QueryStatistics(self.after)
        other.moments = self.moments
        return other
