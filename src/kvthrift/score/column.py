"""What every query so far looked at: accumulated attention, the heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class AttentionReceived(Scorer, name="attention_received"):
    """Attention that each entry received from all queries so far, mean over the group (2306.14048).

    ``average="sum"`` is the published rule, which favours early tokens; ``"rows"`` divides by the number of queries
    that could see the entry, which removes that bias.
    """

    average: Literal["sum", "rows"] = "sum"
    is_mass: ClassVar[bool] = True

    @property
    def needs(self) -> Signals:
        return Signals(columns=True)

    def score(self, view: LayerView) -> Tensor:
        if view.columns is None:
            raise ValueError("the runtime did not gather the column sums that were declared")
        if self.average == "sum":
            return view.columns
        return view.columns / (view.seen[:, None, None] - view.positions).clamp(min=1)
