"""PyramidKV (2406.02069): SnapKV's choice with layer budgets that fall from bottom to top."""

from typing import Literal

from kvthrift.allocate import PyramidLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention


@published("pyramidkv", title="PyramidKV", paper="2406.02069")
def pyramidkv(
    window: int = 8,
    beta: int = 20,
    kernel: int = 7,
    group: Literal["mean", "max", "sum"] = "mean",
    published_rounding: bool = False,
) -> Recipe:
    """Gives lower layers more room than upper ones, on a straight line; picks entries as SnapKV does.

    Group query heads are joined after the sum over queries and before pooling, as in the authors' later KV-head mode.

    Args:
        window: newest queries that are asked, and entries that stay.
        beta: how steep: the top layer keeps about a beta-th of the mean.
        kernel: neighbours that share a score (odd).
        group: how the query heads of a KV head are joined.
        published_rounding: the paper's integer steps, which exceed small budgets a little.
    """
    return Recipe(
        "pyramidkv",
        scorer=WindowAttention(window=window, queries="sum", kernel=kernel, group=group, pool_first=False),
        layers=PyramidLayers(beta, published_rounding),
        protect=Protect(recent=window),
    )
