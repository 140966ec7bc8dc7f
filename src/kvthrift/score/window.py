"""What the last queries look at: observation windows, and the very last query alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.core import LayerView, Signals
from kvthrift.kernels import window_attention, window_sums
from kvthrift.part import require
from kvthrift.score.base import Scorer

Reduce = Literal["mean", "max", "sum"]
Pool = Literal["max", "avg", "none"]


def window_rows(view: LayerView, window: int) -> Tensor:
    """Attention rows ``[B, H, G, W, T]`` of the last ``window`` queries (fewer, if the sequence is shorter)."""
    return window_attention(**_asked(view, window))


def _asked(view: LayerView, window: int) -> dict[str, Any]:
    """The last ``window`` queries and all entries, as kernels take them."""
    if view.queries is None or view.query_positions is None:
        raise ValueError("the runtime did not gather the window queries that were declared")
    return {
        "q": view.queries[:, :, -window:],
        "k": view.keys,
        "q_positions": view.query_positions[:, -window:],
        "k_positions": view.positions,
        "valid": view.valid,
        "scale": view.scale,
        "bias": view.bias,
    }


def reduce(x: Tensor, how: Reduce, dim: int) -> Tensor:
    """Mean, maximum or sum over one dimension."""
    return x.mean(dim) if how == "mean" else x.amax(dim) if how == "max" else x.sum(dim)


def smooth(x: Tensor, how: Pool, kernel: int) -> Tensor:
    """Pool ``x [..., T]`` along its entries with stride 1, keeping T; what lies outside counts as 0."""
    if how == "none" or kernel == 1:
        return x
    flat = x.reshape(1, -1, x.shape[-1])
    half = kernel // 2
    pooled = F.max_pool1d(flat, kernel, 1, half) if how == "max" else F.avg_pool1d(flat, kernel, 1, half)
    return pooled.view(x.shape)


@dataclass(frozen=True)
class WindowAttention(Scorer, name="window_attention"):
    """Attention from an observation window of the newest queries, pooled along the entries (2404.14469).

    Softmax over all entries; reduce over the window's queries; pool along the entries before the window; reduce over
    the group's query heads. ``pool_first`` says which of the last two comes first (they differ for a max-pool).
    With ``variance`` the window's variance of each entry's attention is added that many times (2503.12491); with
    ``value_scale`` the result is multiplied by the head's largest value L1 norm (2509.09754).
    Entries inside the window get 0: a recipe protects them.
    """

    window: int = 32
    queries: Literal["mean", "sum"] = "mean"
    pool: Pool = "max"
    kernel: int = 7
    group: Reduce = "mean"
    pool_first: bool = True
    variance: float = 0.0
    value_scale: bool = False
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= 1, f"window={self.window} must be at least 1 query.")
        require(
            self.kernel >= 1 and self.kernel % 2 == 1, f"kernel={self.kernel} must be odd, so that it has a centre."
        )
        require(self.variance >= 0, f"variance={self.variance} must be 0 or more.")

    @property
    def needs(self) -> Signals:
        return Signals(window=self.window)

    def score(self, view: LayerView) -> Tensor:
        asked = _asked(view, self.window)
        count = asked["q"].shape[2]
        sums = window_sums(**asked, powers=(1, 2) if self.variance else (1,))  # [B, H, G, T] each
        score = sums[0] if self.queries == "sum" else sums[0] / count
        if self.variance:
            score = score + self.variance * (sums[1] / count - (sums[0] / count) ** 2).clamp(min=0)
        score = score.masked_fill(view.tail(self.window)[:, :, None], 0.0)  # [B, H, G, T]
        if self.pool_first:
            score = reduce(smooth(score, self.pool, self.kernel), self.group, 2)
        else:
            score = smooth(reduce(score, self.group, 2), self.pool, self.kernel)
        if self.value_scale:
            norms = view.values.float().abs().sum(-1).masked_fill(~view.valid, 0.0)
            score = score * norms.amax(-1, keepdim=True)
        return score.masked_fill(view.tail(self.window), 0.0)


@dataclass(frozen=True)
class LastQuery(Scorer, name="last_query"):
    """Attention of the newest query, mean over all query heads, so that every head drops the same (2401.06104)."""

    is_mass: ClassVar[bool] = True

    @property
    def needs(self) -> Signals:
        return Signals(window=1)

    def score(self, view: LayerView) -> Tensor:
        rows = window_rows(view, 1)[:, :, :, 0]  # [B, H, G, T]
        mean = rows.mean(dim=(1, 2))[:, None]
        return torch.where(view.tail(1), 1.0, mean.expand(view.valid.shape))
