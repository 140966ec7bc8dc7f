"""Budgets that differ from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.window import window_rows


def pyramid(base: int, prompt: int, protected: int, layers: int, beta: int) -> list[int]:
    """The published integer schedule (2406.02069): unprotected entries a head keeps, layer by layer.

    Args:
        base: mean entries per head, protected ones aside.
        prompt: entries there are, protected ones included.
        protected: entries per head that are always kept.
        layers, beta: number of layers; the top layer keeps about ``base / beta``.
    """
    if prompt < 2 * base or layers == 1:
        return [min(base, prompt - protected)] * layers
    low, high = _ends(base, prompt - protected, beta)
    step = (high - low) // (layers - 1)
    return [high - index * step for index in range(layers)]


def exact_pyramid(base: int, prompt: int, protected: int, layers: int, beta: int) -> list[int]:
    """The same ramp without integer steps: falls linearly and adds up to ``base * layers`` exactly."""
    if prompt < 2 * base or layers == 1:
        return [min(base, prompt - protected)] * layers
    low, high = _ends(base, prompt - protected, beta)
    caps, excess = [], 0
    for index in range(layers):  # error diffusion: each fraction is carried to the next layer
        wanted = (high * (layers - 1) - index * (high - low)) + excess
        caps.append(wanted // (layers - 1))
        excess = wanted % (layers - 1)
    return sorted(caps, reverse=True)


def _ends(base: int, there: int, beta: int) -> tuple[int, int]:
    """Entries at the top and at the bottom of the ramp, flatter where ``there`` are not enough of them."""
    high = min(2 * base - base // beta, there)
    return 2 * base - high, high


@dataclass(frozen=True)
class PyramidLayers(LayerAllocator, name="pyramid"):
    """Budgets that fall linearly from the bottom layer to the top one (2406.02069).

    Short prompts flatten the pyramid, and below twice the budget it is not used at all. The published integer step
    exceeds the budget a little (4.6% at 128 entries and 32 layers); ``published_rounding`` brings that back.
    """

    beta: int = 20
    published_rounding: bool = False

    def __post_init__(self) -> None:
        require(self.beta >= 1, f"beta={self.beta} must be at least 1.")

    def total(self, view: LayerView, per_head: Tensor, protected: int) -> Tensor:
        schedule = pyramid if self.published_rounding else exact_pyramid
        totals = []
        for budget, length in zip(per_head.tolist(), view.tokens, strict=True):
            if length <= budget or budget <= protected:
                totals.append(budget)
                continue
            ramp = schedule(budget - protected, length, protected, view.layers, self.beta)
            totals.append(ramp[view.layer] + protected)
        return torch.tensor(totals, device=per_head.device)


@dataclass(frozen=True)
class PreferenceLayers(LayerAllocator, name="preference"):
    """Layers weighed by how spread and how changeable their attention is (2503.12491).

    Over the attention of the last ``window`` queries to the entries before them: entropy H = sum of -A log A, and
    V = sum over entries of the variance over queries, both averaged over heads; the weight is
    H^(1/tau1) * V^(1/tau2). The published temperatures were searched per model.
    """

    window: int = 32
    tau1: float = 1.6
    tau2: float = 0.4
    scope: ClassVar[Literal["layer", "model"]] = "model"

    def __post_init__(self) -> None:
        require(self.window >= 1, f"window={self.window} must be at least 1 query.")
        require(self.tau1 > 0 and self.tau2 > 0, f"tau1={self.tau1} and tau2={self.tau2} must be positive.")

    @property
    def needs(self) -> Signals:
        return Signals(window=self.window)

    def weight(self, view: LayerView, scores: Tensor) -> Tensor:
        rows = window_rows(view, self.window)  # [B, H, G, W, T]
        window = view.tail(self.window)[:, :, None]
        spread = torch.special.entr(rows).sum(dim=3).masked_fill(window, 0.0)
        change = rows.var(dim=3, unbiased=False).masked_fill(window, 0.0)
        entropy, variance = (x.sum(dim=-1).mean(dim=(1, 2)) for x in (spread, change))
        return (entropy.clamp(min=0).log() / self.tau1 + variance.log() / self.tau2).exp()


@dataclass(frozen=True)
class EntropyLayers(LayerAllocator, name="entropy"):
    """Layers weighed by the normalised entropy of their scores, all heads together (2509.09754)."""

    scope: ClassVar[Literal["layer", "model"]] = "model"

    def weight(self, view: LayerView, scores: Tensor) -> Tensor:
        flat = scores.masked_fill(~view.valid, 0.0).clamp(min=0).flatten(1)
        share = flat / flat.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        entropy = -(share * share.clamp(min=1e-30).log()).sum(dim=-1)
        return entropy / view.lengths.sum(dim=1).clamp(min=2).float().log()
