"""Budgets that are found, not given: a layer drops entries until too much of what is attended to would go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.window import window_rows


@dataclass(frozen=True)
class LossStop(LayerAllocator, name="loss_stop"):
    """Drops the lowest scores until the norm of the last query's attention row has lost a share (2502.16886).

    Per query head the norm is sqrt(sum of a^2) over the entries behind the first ``sinks`` tokens that are still there;
    F is its mean over all query heads of the layer. As many entries go as leave (F_0 - F) / F_0 <= ``loss``, the same
    number in every head; protected ones never go, nor, where only sinks are protected, the last one. Float64
    throughout: squares of probabilities are small. With ``queries`` above 1 the rows of so many last queries are added
    up first.
    """

    loss: float = 0.01
    sinks: int = 4
    queries: int = 1
    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.loss >= 0, f"loss={self.loss} must be 0 or more.")
        require(self.sinks >= 0, f"sinks={self.sinks} must be 0 or more tokens.")
        require(self.queries >= 1, f"queries={self.queries} must be at least 1 query.")

    @property
    def needs(self) -> Signals:
        return Signals(window=self.queries)

    def stop(self, view: LayerView, scores: Tensor, protected: Tensor) -> Tensor:
        rows = window_rows(view, self.queries).double().sum(dim=3)  # [B, H, G, T]
        rows = rows.masked_fill((~view.valid | (view.positions < self.sinks))[:, :, None], 0.0)
        free = view.valid & ~protected
        order = scores.masked_fill(~free, float("inf")).argsort(dim=-1, descending=False, stable=True)  # [B, H, T]
        losses = self.losses(rows.gather(3, order[:, :, None].expand(rows.shape)))  # [B, T]
        stays = (protected & (view.positions >= self.sinks)).flatten(1).any(dim=1)  # else the best free one must
        most = (free.sum(dim=-1).amax(dim=1) - (~stays).long()).clamp(min=0)
        allowed = (losses <= self.loss) & (torch.arange(losses.shape[1], device=losses.device) <= most[:, None])
        return view.lengths.amax(dim=1) - (allowed.sum(dim=1) - 1).clamp(min=0)

    @staticmethod
    def losses(rows: Tensor) -> Tensor:
        """Share of F that is lost once the first j entries are gone, for every j: ``[B, H, G, T] -> [B, T]``."""
        left = rows.square().flip(-1).cumsum(dim=-1).flip(-1).sqrt().mean(dim=(1, 2))
        return ((left[:, :1] - left) / left[:, :1].clamp(min=1e-300)).clamp(min=0.0)
