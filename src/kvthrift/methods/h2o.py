"""H2O (2306.14048): heavy hitters by accumulated attention, and the newest tokens."""

from dataclasses import replace
from typing import Literal

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import AttentionReceived


@published("h2o", title="H2O", paper="2306.14048")
def h2o(
    recent: int = 32,
    average: Literal["sum", "rows"] = "sum",
    decode: bool = False,
    products: Literal["exact", "int8"] = "exact",
) -> Recipe:
    """Keeps entries that all queries so far attended to most, and the newest ones.

    The paper gives half the budget to recent entries; set ``recent`` to half of yours for that. ``average="rows"`` is
    the form that divides by the queries that could see an entry (observed attention).

    Args:
        recent: newest entries that stay.
        average: sum over queries, or mean over those that see the entry.
        decode: keep accumulating and evict at every decoded token too.
        products: of queries and keys, as they are, or of both in 8 bits, for long prompts on a GPU.
    """
    recipe = Recipe("h2o", scorer=AttentionReceived(average, products), protect=Protect(recent=recent))
    return replace(recipe, trigger=Trigger(every=1)) if decode else recipe
