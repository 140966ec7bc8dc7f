"""The first and the newest entries before all others, whatever the score of what lies between."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.window import WindowAttention


@dataclass(frozen=True)
class EndsFirst(Scorer, name="ends_first"):
    """Any score, with the first ``sinks`` tokens and the ``recent`` newest entries above it.

    Where a head's count is less than both, sinks stay first, then what is newest: sinks and a recent window are then
    all there is (2309.17453). Unlike protected entries, they never make a budget too small.
    """

    base: Scorer = field(default_factory=WindowAttention)
    sinks: int = 16
    recent: int = 256

    def __post_init__(self) -> None:
        require(self.sinks >= 0, f"sinks={self.sinks} must be 0 or more tokens.")
        require(self.recent >= 0, f"recent={self.recent} must be 0 or more entries.")

    @property
    def model(self) -> str:
        return self.base.model

    @property
    def needs(self) -> Signals:
        return self.base.needs

    def score(self, view: LayerView) -> Tensor:
        middle = self.base.score(view).float()
        top = middle.masked_fill(~view.valid, float("-inf")).amax(dim=-1, keepdim=True).clamp(min=0)
        steps = torch.arange(view.keys.shape[2], device=view.keys.device)
        age = steps / view.lengths[..., None].clamp(min=1)  # 0 for the oldest, below 1 for the newest
        scale = top.clamp(min=1.0)  # keeps ages apart from one another beside a large score
        score = torch.where(view.tail(self.recent), top + scale * (1 + age), middle)
        return torch.where((view.positions < self.sinks) & view.valid, top + scale * (3 - age), score)
