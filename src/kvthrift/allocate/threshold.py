"""Budgets that are found, not given: every entry whose score is high enough stays, however many those are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvthrift.allocate.base import HeadAllocator, LayerAllocator
from kvthrift.allocate.heads import AdaptiveHeads
from kvthrift.core import LayerView
from kvthrift.part import require


def _check(log_score: float) -> None:
    require(not math.isnan(log_score), f"log_score={log_score} must be a number: the logarithm of a score.")


def _above(scores: Tensor, log_score: float) -> Tensor:
    """Which ``scores`` are at least exp of ``log_score``; compared as logarithms, where small scores keep apart."""
    return scores.double().clamp(min=0).log() >= log_score


@dataclass(frozen=True)
class ThresholdLayers(LayerAllocator, name="threshold"):
    """A layer has room for the entries whose score is at least exp(``log_score``), as a mean over heads (2601.07891).

    Rounded up, so that :class:`ThresholdHeads` of the same number gives each head just its own entries; with other
    heads they share that room. A budget is an upper limit.
    """

    log_score: float = -6.0
    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.log_score)

    def stop(self, view: LayerView, scores: Tensor, protected: Tensor) -> Tensor:
        stays = (_above(scores, self.log_score) | protected) & view.valid
        counts = stays.sum(dim=-1).clamp(min=1)
        return -(-counts.sum(dim=1) // counts.shape[1])


@dataclass(frozen=True)
class ThresholdHeads(HeadAllocator, name="threshold"):
    """Each head keeps its entries whose score is at least exp(``log_score``), and one at least (2601.07891).

    Where the layer has less room than that, the highest scores of the layer stay, whichever head they are in; room
    that is left over is not used.
    """

    log_score: float = -6.0

    def __post_init__(self) -> None:
        _check(self.log_score)

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        wanted = torch.minimum((_above(scores, self.log_score) & view.valid).sum(dim=-1).clamp(min=1), view.lengths)
        fits = wanted.sum(dim=1) <= per_head * scores.shape[1]
        if bool(fits.all()):
            return wanted
        return torch.where(fits[:, None], wanted, AdaptiveHeads(0.0).split(scores, per_head, view))
