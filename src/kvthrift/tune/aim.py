"""What a search is after: how much of a recipe's measurements is one fitness, or two values to trade.

Numbers only; knows nothing of models, recipes or how anything was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvthrift.errors import OptionError
from kvthrift.part import require

QUALITIES = ("score", "agreement")
OBJECTIVES = ("score", "agreement", "bytes", "score,bytes", "agreement,bytes")
WORST = -2.0  # below every fitness that was measured


def cache_score(mean: float, target: float, gamma: float = 0.2) -> float:
    """How well a mean budget keeps to its target, 0 to 1 (2509.08315): 1 at it, 0 at twice it, 1 - gamma at nothing.

    Args:
        mean: entries per head, averaged over layers.
        target: what it should be.
        gamma: how much is lost by spending nothing.
    """
    return max(0.0, 1 - (mean - target) / target) if mean > target else 1 - gamma * (1 - mean / target)


def reward(quality: float, mean: float, target: float, lam: float = 0.3, gamma: float = 0.2) -> float:
    """``quality * (1 + lam * cache_score)``, what EvolKV maximises (2509.08315); quality is 0 or more."""
    return quality * (1 + lam * cache_score(mean, target, gamma))


@dataclass(frozen=True)
class Measured:
    """A recipe on all prompts of a study.

    Attributes:
        score: mean of the tasks' score, 0 to 1.
        agreement: share of the full cache's answer tokens that are also this recipe's likeliest.
        bytes, full_bytes: mean held behind the reading, in live tensors, by this recipe and by the full cache.
        entries, full_entries: mean held.
        most_bytes: of the prompt on which most was held.
    """

    score: float
    agreement: float
    bytes: float
    full_bytes: float
    entries: float
    full_entries: float
    most_bytes: float

    def plain(self) -> dict[str, Any]:
        """As plain data, with None for what is not a number."""
        return {key: value if math.isfinite(value) else None for key, value in self.__dict__.items()}


@dataclass(frozen=True)
class Aim:
    """What is better.

    Attributes:
        objective: one of :data:`OBJECTIVES`; the best quality at a budget, the fewest bytes at a quality, or both.
        quality: what the floor is of; that of the objective where it names one.
        floor: the least quality: a share of tokens that agree, or a share of the full cache's score.
        lam, gamma: see :func:`reward`; for budgets that may depart from the target.

    Raises:
        OptionError: no such objective or quality, or a number out of range.
    """

    objective: str = "score"
    quality: str = "agreement"
    floor: float = 0.99
    lam: float = 0.3
    gamma: float = 0.2

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("quality", self.quality, QUALITIES),
        ):
            if value not in known:
                raise OptionError(f"{name} {value!r} is not one there is. Valid: {'; '.join(known)}.")
        require(0 < self.floor <= 1, f"floor={self.floor} must lie above 0 and be at most 1.")
        require(self.lam >= 0, f"lambda={self.lam} must be 0 or more.")
        require(0 <= self.gamma <= 1, f"gamma={self.gamma} must lie between 0 and 1.")

    @property
    def shrinks(self) -> bool:
        """Whether fewer bytes are better."""
        return "bytes" in self.objective

    @property
    def trades(self) -> bool:
        """Whether there are two values, neither of which is above the other."""
        return "," in self.objective

    @property
    def judges(self) -> str:
        """The quality that counts: "score" or "agreement"."""
        return self.quality if self.objective == "bytes" else self.objective.partition(",")[0]

    def quality_of(self, found: Measured) -> float:
        """The quality that counts, NaN where it has no value."""
        return found.score if self.judges == "score" else found.agreement

    def fitness(self, found: Measured, mean: float, target: float, full_score: float) -> float:
        """Larger is better; NaN where something measured is not a number.

        Args:
            found: what was measured.
            mean, target: entries per head and layer, of the recipe and as asked for.
            full_score: the full cache's.
        """
        quality = self.quality_of(found)
        if not self.shrinks:
            return reward(quality, mean, target, self.lam, self.gamma)
        share = (found.bytes + found.entries / found.full_entries) / (found.full_bytes + 1)  # entries break ties
        lacking = self.floor * (full_score if self.judges == "score" else 1.0) - quality
        if math.isnan(lacking) or math.isnan(share):
            return math.nan
        return -lacking if lacking > 1e-12 else 1 + 1 / (1 + share)

    def values(self, found: Measured) -> tuple[float, float]:
        """Quality, to be large, and bytes, to be small."""
        return self.quality_of(found), found.bytes
