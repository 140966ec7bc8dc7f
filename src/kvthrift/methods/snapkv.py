"""SnapKV (2404.14469): what a window of the newest queries attends to, pooled along the entries."""

from typing import Literal

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention


@published("snapkv", title="SnapKV", paper="2404.14469")
def snapkv(
    window: int = 32,
    pool: Literal["max", "avg", "none"] = "max",
    kernel: int = 7,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Keeps what the last queries attend to, smoothed over neighbours, and the window itself.

    Args:
        window: newest queries that are asked, and entries that stay.
        pool: how neighbours share a score.
        kernel: neighbours that share it (odd).
        group: how the query heads of a KV head are joined.
    """
    scorer = WindowAttention(window=window, pool=pool, kernel=kernel, group=group)
    return Recipe("snapkv", scorer=scorer, protect=Protect(recent=window))
