"""LAVa (2509.09754): layers weighed by the entropy of their scores, heads competing within."""

from typing import Literal

from kvthrift.allocate import AdaptiveHeads, EntropyLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention


@published("lava", title="LAVa", paper="2509.09754")
def lava(
    window: int = 32, kernel: int = 7, safeguard: float = 0.2, group: Literal["mean", "max", "sum"] = "max"
) -> Recipe:
    """Budgets over layers and heads from the same score: window attention times the head's largest value norm.

    Args:
        window: newest queries that are asked, and entries that stay.
        kernel: neighbours that share a score (odd).
        safeguard: share of the mean budget that every head keeps first.
        group: how the query heads of a KV head are joined.
    """
    return Recipe(
        "lava",
        scorer=WindowAttention(window=window, kernel=kernel, group=group, value_scale=True),
        layers=EntropyLayers(),
        heads=AdaptiveHeads(safeguard),
        protect=Protect(recent=window),
    )
