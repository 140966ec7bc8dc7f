"""The merger's contract, and forgetting."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvthrift.core import LayerView
from kvthrift.part import Part
from kvthrift.score import Scorer


@dataclass(frozen=True)
class Merged:
    """What the kept entries hold afterwards: ``values [B, H, T, Dv]`` and, if any, a logit ``bias [B, H, T]``."""

    values: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Merger(Part, kind="merge"):
    """What becomes of the entries that go. ``biased`` says whether kept entries carry a logit bias."""

    biased: ClassVar[bool] = False

    def check(self, scorer: Scorer) -> None:
        """Refuse a scorer this merger cannot weigh by.

        Raises:
            RecipeError: with the reason.
        """
        return

    @abstractmethod
    def merge(self, view: LayerView, keep: Tensor, scores: Tensor, bias: Tensor | None) -> Merged:
        """Join the entries that go to those that stay.

        Args:
            view: the layer.
            keep: ``[B, H, T]`` bool.
            scores: ``[B, H, T]`` float32 as the scorer gave them.
            bias: ``[B, H, T]`` logit bias from earlier merges, if any.
        """


@dataclass(frozen=True)
class Evict(Merger, name="evict"):
    """They are forgotten."""

    def merge(self, view: LayerView, keep: Tensor, scores: Tensor, bias: Tensor | None) -> Merged:
        return Merged(view.values, bias)
