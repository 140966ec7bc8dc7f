"""Scores that look at nothing but order or chance: the controls that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.core import LayerView
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class Recency(Scorer, name="recency"):
    """Newer is better: with protected sinks, the attention-sink window (2309.17453)."""

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


@dataclass(frozen=True)
class Uninformed(Scorer, name="random"):
    """Chance, repeatable: a number drawn from the seed, the layer, the head and the token's position.

    A token's draw does not depend on what else is in the cache, so later cuts keep a subset of earlier ones.
    """

    seed: int = 0

    def score(self, view: LayerView) -> Tensor:
        heads = torch.arange(view.keys.shape[1], device=view.keys.device)[None, :, None]
        x = view.positions * 2654435761 + heads * 40503 + view.layer * 69621 + (self.seed + 1) * 362437
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return (x & 0xFFFFFF).float() / 2**24
