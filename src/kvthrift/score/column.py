"""What every query so far looked at: accumulated attention, the heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvthrift.core import LayerView, Powers, Products, Signals
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class AttentionReceived(Scorer, name="attention_received"):
    """Attention that each entry received from all queries so far, mean over the group (2306.14048).

    ``average="sum"`` is the published rule, which favours early tokens; ``"rows"`` divides by the number of queries
    that could see the entry, which removes that bias. ``products="int8"`` rounds queries and keys to 8 bits before they
    are multiplied, in passes over several tokens.
    """

    average: Literal["sum", "rows"] = "sum"
    products: Products = "exact"
    is_mass: ClassVar[bool] = True

    @property
    def needs(self) -> Signals:
        return Signals(columns=True) if self.products == "exact" else Signals(powers=(self._sums,))

    @property
    def _sums(self) -> Powers:
        return Powers(power=1, window=0, kernel=1, products=self.products)

    def score(self, view: LayerView) -> Tensor:
        if self.products == "exact":
            columns = view.columns
        else:  # these are summed over the group
            columns = view.powers[self._sums] / view.group if self._sums in view.powers else None
        if columns is None:
            raise ValueError("the runtime did not gather the column sums that were declared")
        if self.average == "sum":
            return columns
        return columns / (view.seen[:, None, None] - view.positions).clamp(min=1)
