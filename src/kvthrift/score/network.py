"""What a costly score would say, foretold by a small network of an entry's own key and value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.surrogate import EXTRA, LOWEST, features, of_layer, unpack

_BLOCK = 4096  # entries whose features are held at a time


@dataclass(frozen=True)
class NetworkSurrogate(Scorer, name="network"):
    """exp of a network of each entry's pre-RoPE key, value, and their norms, its own for every head (2601.07891).

    One hidden layer of ``width`` units with GELU. ``weights`` is :func:`kvthrift.score.surrogate.pack` of ``[layers,
    heads, F * width + 2 * width + 1]``, F = Dk + Dv + 3: inner weights, inner biases, outer weights, outer bias; else
    as :class:`LinearSurrogate`.
    """

    weights: str = ""
    layers: int = 0
    heads: int = 0
    width: int = 1
    model: str = ""
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.width >= 1, f"width={self.width} must be at least 1 unit.")
        if self.weights:
            unpack(self.weights, self.layers, self.heads)

    def __str__(self) -> str:
        return f"{self.name}({self.layers} x {self.heads} heads, width={self.width})"

    @property
    def needs(self) -> Signals:
        return Signals(rope=True)

    def score(self, view: LayerView) -> Tensor:
        if view.rope is None:
            raise ValueError("the runtime did not gather the rotary embedding that was declared")
        w1, b1, w2, b2 = self._mine(view)
        parts = []
        for start in range(0, view.keys.shape[2], _BLOCK):
            block = slice(start, start + _BLOCK)
            keys = view.rope.rotate(view.keys[:, :, block], -view.positions[:, :, block])
            inner = F.gelu(features(keys, view.values[:, :, block]) @ w1 + b1)  # [B, H, block, M]
            parts.append((inner @ w2)[..., 0] + b2)
        log = torch.cat(parts, dim=-1)
        return log.clamp(min=LOWEST, max=-LOWEST).exp().masked_fill(~view.valid, 0.0)

    def _mine(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This layer's ``[H, F, M]``, ``[H, 1, M]``, ``[H, M, 1]`` and ``[H, 1]``."""
        heads, m = view.keys.shape[1], self.width
        size = view.keys.shape[-1] + view.values.shape[-1] + EXTRA
        mine = of_layer(view, self.weights, self.layers, self.heads, size * m + 2 * m + 1)
        w1, b1, w2, b2 = torch.split(mine, [size * m, m, m, 1], dim=-1)
        return w1.view(heads, size, m), b1[:, None], w2[..., None], b2
