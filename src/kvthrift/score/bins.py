"""Scores with a bias that each head has for where in the text an entry stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.errors import ModelMismatchError
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.power import AttentionPower


@dataclass(frozen=True)
class PositionBias(Scorer, name="position_bias"):
    """Any score, plus ``weight`` times the head's bias for the bin that the entry's position lies in (2410.00161).

    ``edges`` are the first positions of the bins, rising from 0; the last bin has no end. ``bias[l][h]`` has a number
    for every bin, of either sign, ``l`` the model's own number of a layer; no edges and no table add nothing.
    ``model`` is the fingerprint of the model it was measured on, the base's by default.
    """

    base: Scorer = field(default_factory=AttentionPower)
    edges: tuple[int, ...] = ()
    bias: tuple[tuple[tuple[float, ...], ...], ...] = ()
    weight: float = 1.0
    measured: str = ""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, f"weight={self.weight} must be 0 or more, and finite.")
        rising = all(a < b for a, b in pairwise(self.edges)) and self.edges[:1] in ((), (0,))
        require(rising, f"edges={self.edges} must rise, and begin with 0.")
        rows = [row for layer in self.bias for row in layer]
        even = all(len(row) == len(self.edges) and all(map(math.isfinite, row)) for row in rows)
        require(even, f"the table of biases must have {len(self.edges)} finite numbers for every head, one a bin.")

    def __str__(self) -> str:
        return f"{self.name}({self.base}, {len(self.bias)} layers of {len(self.edges)} bins, weight={self.weight:g})"

    @property
    def model(self) -> str:
        return self.measured or self.base.model

    @property
    def needs(self) -> Signals:
        return self.base.needs

    def score(self, view: LayerView) -> Tensor:
        score = self.base.score(view).float()
        if not self.bias:
            return score
        number, heads = view.numbers[view.layer] if view.numbers else view.layer, score.shape[1]
        if number >= len(self.bias) or len(self.bias[number]) != heads:
            raise ModelMismatchError(
                f"the table of position biases is for {len(self.bias)} layers of {len(self.bias[0])} KV heads, but "
                f"this model has at least {number + 1} of {heads}. Give a table of this model."
            )
        table = torch.tensor(self.bias[number], device=score.device)  # [H, bins]
        inner = torch.tensor(self.edges[1:], device=score.device, dtype=torch.int64)
        bins = torch.bucketize(view.positions.contiguous(), inner, right=True)  # [B, H, T]
        return score + self.weight * table.expand(len(bins), *table.shape).gather(2, bins)
