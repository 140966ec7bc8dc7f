"""Signals that have to be gathered while the model runs: the newest queries, and moments of all queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import QueryMoments, Rope
from kvthrift.runtime.step import Ints, Step


class QueryWindow:
    """The newest queries of every sequence.

    ``queries [B, HG, W, D]`` post-RoPE and ``positions [B, W]`` int64, oldest first; position -1 where there is none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.queries: Tensor | None = None
        self.positions: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.queries, self.positions) if t is not None)

    def see(self, q: Tensor, step: Step) -> None:
        """Take in the packed queries ``[B, HG, length, D]`` of a pass."""
        positions = step.positions.masked_fill(~step.real, -1) if step.padded else step.positions
        if self.queries is not None and self.positions is not None:
            q = torch.cat((self.queries, q), dim=2)
            positions = torch.cat((self.positions, positions), dim=1)
        if step.padded:  # real ones to the right, in order
            order = (positions >= 0).long().argsort(dim=1, stable=True)
            positions = positions.gather(1, order)
            q = q.gather(2, order[:, None, :, None].expand(q.shape))
        self.queries = q[:, :, -self.size :].clone()
        self.positions = positions[:, -self.size :].clone()

    def rewind(self, limits: Tensor) -> None:
        """Forget queries at position ``limits [B]`` or later."""
        if self.positions is None or self.queries is None:
            return
        self.positions = self.positions.masked_fill(self.positions >= limits[:, None].to(self.positions.device), -1)
        order = (self.positions >= 0).long().argsort(dim=1, stable=True)
        self.positions = self.positions.gather(1, order)
        self.queries = self.queries.gather(2, order[:, None, :, None].expand(self.queries.shape))

    def select(self, rows: Ints) -> None:
        """Hold the sequences ``rows`` of the present ones."""
        if self.queries is not None and self.positions is not None:
            index = torch.from_numpy(rows).to(self.queries.device)
            self.queries, self.positions = self.queries[index], self.positions[index]

    def fork(self) -> QueryWindow:
        """An independent copy (tensors are never written in place)."""
        other = QueryWindow(self.size)
        other.queries, other.positions = self.queries, self.positions
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
        use, count = step.once(("counting", self.after), lambda: self._counting(step))
        turns = step.once(("turns", rope), lambda: kernels.query_turns(q, step.positions, rope))
        total, outer = kernels.query_moments(q, step.positions, use, rope, turns)
        if self.moments is None:
            self.moments = QueryMoments(count.clone(), total, outer)  # each layer holds, and saves, its own
        else:
            old = self.moments
            self.moments = QueryMoments(old.count + count, old.total + total, old.outer + outer)

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
