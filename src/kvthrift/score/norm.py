"""Scores from keys alone: small norms, and directions unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvthrift.core import LayerView
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer, name="key_norm"):
    """Minus the L2 norm of the key: small norms attract attention (2406.11430)."""

    def score(self, view: LayerView) -> Tensor:
        return view.keys.float().square().sum(dim=-1).sqrt().neg()


@dataclass(frozen=True)
class KeyDifference(Scorer, name="key_difference"):
    """Minus the cosine to the mean key direction: keys unlike the others stay (2504.15364)."""

    def score(self, view: LayerView) -> Tensor:
        directions = F.normalize(view.keys.float(), dim=-1)
        real = view.valid[..., None]
        anchor = (directions * real).sum(dim=2, keepdim=True) / view.lengths[..., None, None].clamp(min=1)
        return -F.cosine_similarity(view.keys.float(), anchor, dim=-1)
