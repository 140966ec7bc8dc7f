"""Sums of powers of attention: squares favour entries that few queries look at hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvthrift.core import LayerView, Powers, Signals
from kvthrift.part import require
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class AttentionPower(Scorer, name="attention_power"):
    """Squared attention that an entry received, summed over queries, max-pooled, summed over the group (2410.00161).

    Only the ``window`` newest queries of a prompt count (0: all), and none for entries fewer than ``buffer`` positions
    before it. Decode steps add theirs, unpooled. No mean and no scaling: layers and heads compete with raw sums.
    ``squared=False`` sums the attention itself. ``average`` divides by the queries that counted for an entry, of all
    there were (over a window it would change no order).
    """

    squared: bool = True
    window: int = 8
    buffer: int = 0
    kernel: int = 7
    average: bool = False
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= 0, f"window={self.window} must be 0 (all) or more queries.")
        require(self.buffer >= 0, f"buffer={self.buffer} must be 0 or more positions.")
        require(
            not self.average or not self.window,
            f"average=True needs window=0: over the same {self.window} queries for every entry it changes no order.",
        )
        require(
            self.kernel >= 1 and self.kernel % 2 == 1, f"kernel={self.kernel} must be odd, so that it has a centre."
        )

    @property
    def sums(self) -> Powers:
        """The sums that this reads."""
        return Powers(2 if self.squared else 1, self.window, self.buffer, self.kernel)

    @property
    def needs(self) -> Signals:
        return Signals(powers=(self.sums,))

    def score(self, view: LayerView) -> Tensor:
        if self.sums not in view.powers:
            raise ValueError("the runtime did not gather the sums of powers that were declared")
        sums = view.powers[self.sums]
        if not self.average:
            return sums
        return sums / (view.seen[:, None, None] - view.positions - self.buffer).clamp(min=1)
