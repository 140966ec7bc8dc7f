"""Scores from how a token stands out against the tokens that come after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.core import LayerView
from kvthrift.part import require
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class LagRelative(Scorer, name="lag_relative"):
    """Rank within its partition of a token's spread, measured against the next partition's range (2504.04704).

    Behind ``sinks`` tokens the entries are cut into partitions of ``lag``. Each channel is scaled by the minimum and
    maximum of the following partition; a token's value is the standard deviation over channels, softmaxed over its
    partition, for keys and values alike; the mean of the two gives the rank, so every partition loses the same share.
    Sinks, the last full partition and what is left over score 1. With fewer than ``sinks + 2 * lag`` entries the
    newest are kept instead.
    """

    sinks: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        require(self.sinks >= 0, f"sinks={self.sinks} must be 0 or more.")
        require(self.lag >= 2, f"lag={self.lag} must be at least 2 entries.")

    def score(self, view: LayerView) -> Tensor:
        b, h, t = view.keys.shape[:3]
        steps = torch.arange(t, device=view.keys.device)
        recency = steps.float() / view.lengths[..., None].clamp(min=1)
        count = (t - self.sinks) // self.lag
        if count < 2:
            return recency
        ranks = (self._spread(view.keys, count) + self._spread(view.values, count)) / 2  # [B, H, count - 1, lag]
        order = ranks.argsort(dim=-1, stable=True).argsort(dim=-1).float() / self.lag
        score = torch.ones(b, h, t, device=view.keys.device)
        stop = self.sinks + (count - 1) * self.lag
        score[..., self.sinks : stop] = order.flatten(2)
        partitions = (view.lengths - self.sinks) // self.lag  # [B, H]; ragged heads have fewer
        complete = self.sinks + (partitions - 1) * self.lag
        score = torch.where(steps >= complete[..., None], 1.0, score)
        return torch.where((partitions < 2)[..., None], recency, score)

    def _spread(self, x: Tensor, count: int) -> Tensor:
        cut = x[:, :, self.sinks : self.sinks + count * self.lag].float()
        parts = cut.reshape(*x.shape[:2], count, self.lag, x.shape[-1])  # [B, H, count, lag, D]
        following = parts[:, :, 1:]
        low, high = following.amin(dim=3, keepdim=True), following.amax(dim=3, keepdim=True)
        scaled = (parts[:, :, :-1] - low) / (high - low).clamp(min=1e-6)
        return torch.softmax(scaled.std(dim=-1), dim=-1)
