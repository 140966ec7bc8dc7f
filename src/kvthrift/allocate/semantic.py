"""Room for heads that say something of their own: the whole text for these, the rest shared by the others."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.allocate.base import HeadAllocator
from kvthrift.allocate.heads import ranks
from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.window import window_rows

_LOG = logging.getLogger("kvthrift")


def heterogeneous(heads: int, layer: int, layers: int, beta: float, last: float) -> int:
    """Heads that are to be whole in a layer: ``heads * beta`` in the lowest, ``last`` in the top one, on a line."""
    first = heads * beta
    fall = (first - last) / (layers - 1) * layer if layers > 1 else 0.0
    return max(0, min(heads, math.floor(first - fall + 0.5)))


def middle_tokens(budget: float, tokens: int, heads: int, whole: int, ends: int) -> int:
    """Tokens between sinks and recent ones of each head that is not whole; negative if there is no room for them.

    Args:
        budget: entries of the layer in all.
        tokens: tokens of the text.
        heads, whole: heads of the layer, and how many of them keep everything.
        ends: sinks and recent tokens together.
    """
    if whole >= heads:
        return 0 if budget >= tokens * heads else -1
    return min(math.floor((budget - tokens * whole) / (heads - whole) - ends), max(tokens - ends, 0))


@dataclass(frozen=True)
class SemanticHeads(HeadAllocator, name="semantic"):
    """Heads whose output lies far from the layer's mean keep everything, the others share the rest (2501.15113).

    A head's semantic vector is the sum of its values, weighted by the attention of the last ``window`` queries, over
    the ``tokens`` it attends to most (mean over the window and over the group's query heads; not normalised). Of the
    layer's count of heterogeneous heads, which falls linearly from ``beta`` of the heads to ``last`` heads, all but one
    are those farthest from the mean vector, and one is the nearest; a count of 1 takes the farthest. KV heads are
    what is counted. Where whole heads would leave the others less than ``ends`` entries each, there are fewer of them.
    What a whole division leaves over goes to the lowest of the other heads.
    """

    beta: float = 0.3
    last: float = 1.0
    tokens: int = 256
    window: int = 32
    ends: int = 272

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, f"beta={self.beta} must lie between 0 and 1.")
        require(0 <= self.last < float("inf"), f"last={self.last} must be 0 or more heads.")
        require(self.tokens >= 1, f"tokens={self.tokens} must be at least 1.")
        require(self.window >= 1, f"window={self.window} must be at least 1 query.")
        require(self.ends >= 0, f"ends={self.ends} must be 0 or more entries.")

    @property
    def needs(self) -> Signals:
        return Signals(window=self.window)

    def distances(self, view: LayerView) -> Tensor:
        """How far each head's semantic vector is from the layer's mean, ``[B, H]`` float32."""
        column = window_rows(view, self.window).mean(dim=(2, 3))  # [B, H, T]
        column = column.masked_fill(~view.valid, 0.0)
        weight = column.masked_fill(ranks(column) >= self.tokens, 0.0)
        values = view.values.float().masked_fill(~view.valid[..., None], 0.0)
        vectors = (weight[..., None, :] @ values)[..., 0, :]  # [B, H, Dv]
        far: Tensor = (vectors - vectors.mean(dim=1, keepdim=True)).norm(dim=-1)
        return far

    def whole_heads(self, budget: int, tokens: int, heads: int, view: LayerView) -> int:
        """Heads that keep everything: as many as are wanted in this layer, or as there is room for."""
        wanted = heterogeneous(heads, view.layer, view.layers, self.beta, self.last)
        ends = min(self.ends, tokens)
        found = next((n for n in range(wanted, 0, -1) if middle_tokens(budget, tokens, heads, n, ends) >= 0), 0)
        if found < wanted:
            _LOG.info("layer %d: room for %d of %d whole heads.", view.layer, found, wanted)
        return found

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        heads = view.lengths.shape[1]
        distances = self.distances(view)
        longest = view.lengths.amax(dim=1)
        totals = torch.minimum(per_head * heads, view.lengths.sum(dim=1))
        found = [
            self.whole_heads(int(total), int(tokens), heads, view)
            for total, tokens in zip(totals.tolist(), longest.tolist(), strict=True)
        ]
        count = torch.tensor(found, device=scores.device)[:, None]
        far = ranks(distances) < count - (count >= 2).long()
        near = ranks(distances.neg().masked_fill(far, float("-inf"))) == 0
        whole = far | (near & (count >= 2))
        counts = view.lengths.masked_fill(~whole, 0)
        rest = totals - counts.sum(dim=1)
        for _ in range(heads):  # heads shorter than their share leave it to the others
            free = ~whole & (counts < view.lengths)
            among = free.sum(dim=1).clamp(min=1)
            order = free.long().cumsum(dim=1) - 1
            share = (rest // among)[:, None] + (order < (rest % among)[:, None]).long()
            given = torch.minimum(share, view.lengths - counts).masked_fill(~free, 0)
            counts, rest = counts + given, rest - given.sum(dim=1)
            if not bool((rest > 0).any()):
                break
        return counts.clamp(min=1)
