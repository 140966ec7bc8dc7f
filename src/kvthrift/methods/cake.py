"""CAKE (2503.12491): layers weighed by the spread and change of their attention, cut in a cascade."""

from typing import Literal

from kvthrift.allocate import PreferenceLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import WindowAttention


@published("cake", title="CAKE", paper="2503.12491")
def cake(
    window: int = 32,
    gamma: float = 200.0,
    kernel: int = 5,
    tau1: float = 1.6,
    tau2: float = 0.4,
    decode: bool = False,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Gives layers room by attention entropy and variance; keeps entries attended to much or changeably.

    Budgets are shared out among the layers seen so far and finished layers are cut further, so the peak is bounded by
    the budget plus one layer. The temperatures were searched per model; the defaults are those of Llama-3.1-8B.

    Args:
        window: newest queries that are asked, and entries that stay.
        gamma: weight of the variance over the window's queries.
        kernel: neighbours that share a score (odd).
        tau1: temperature of the entropy.
        tau2: temperature of the variance.
        decode: cut to the budget again after every decoded token.
        group: how the query heads of a KV head are joined.
    """
    return Recipe(
        "cake",
        scorer=WindowAttention(window=window, pool="avg", kernel=kernel, variance=gamma, group=group),
        layers=PreferenceLayers(window, tau1, tau2),
        protect=Protect(recent=window),
        trigger=Trigger(every=1 if decode else None),
    )
