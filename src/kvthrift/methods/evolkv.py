"""EvolKV (2509.08315): SnapKV's choice with a budget for every layer that an evolutionary search found."""

from typing import Literal

from kvthrift.allocate import BudgetLayers
from kvthrift.data import tuned
from kvthrift.errors import RecipeError
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention


@published("evolkv", title="EvolKV", paper="2509.08315")
def evolkv(
    table: str = "smollm2-niah",
    window: int = 32,
    pool: Literal["max", "avg", "none"] = "max",
    kernel: int = 7,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Gives each layer what a search over tasks found best for it, then chooses as SnapKV does.

    The list of budgets belongs to one model, another is refused, and to the tasks it was found on. It is scaled to
    whatever budget is asked for, with the same total.

    Args:
        table: "smollm2-niah", shipped for the embedded model and found on needles, or a recipe file
            from 'kvthrift tune'.
        window: newest queries that are asked, and entries that stay.
        pool: how neighbours share a score.
        kernel: neighbours that share it (odd).
        group: how the query heads of a KV head are joined.
    """
    scorer = WindowAttention(window=window, pool=pool, kernel=kernel, group=group)
    return Recipe("evolkv", scorer=scorer, layers=_listed(table), protect=Protect(recent=window))


def _listed(table: str) -> BudgetLayers:
    shipped = tuned("evolkv")
    if table in shipped:
        return BudgetLayers.from_plain(shipped[table]["layers"])
    try:
        found = Recipe.load(table)
    except RecipeError as error:
        raise RecipeError(
            f"table {table!r} is neither shipped for evolkv (shipped: {', '.join(sorted(shipped)) or 'none'}) nor a "
            f"recipe file: {error} Make one with 'kvthrift tune --method snapkv --out FOLDER' and give its best.toml."
        ) from error
    if not isinstance(found.layers, BudgetLayers):
        raise RecipeError(
            f"recipe file {table} lists no budgets of layers (layers={found.layers.name}). Make one with 'kvthrift "
            "tune --method snapkv --vary layers --out FOLDER' and give its best.toml."
        )
    return found.layers
