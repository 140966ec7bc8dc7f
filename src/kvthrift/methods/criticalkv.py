"""CriticalKV (2502.03805): half the room by score, half by what an entry adds to the layer's output."""

from kvthrift.errors import RecipeError
from kvthrift.methods.registry import base_recipe, published
from kvthrift.recipe import Recipe
from kvthrift.select import OutputAware


@published("criticalkv", title="CriticalKV", paper="2502.03805")
def criticalkv(base: str = "snapkv", first: float = 0.5, epsilon: float = 1e-4) -> Recipe:
    """Ranks the second half of each head's room by score times the L1 norm of the projected value.

    Over ``base="adakv"`` head budgets come from the base scores first. Over Expected Attention the value norm is off,
    since those scores hold one already.

    Args:
        base: the method whose scores come first.
        first: share of the room that goes by the base score.
        epsilon: added to the base score in the second half.
    """
    recipe = base_recipe(base, "criticalkv")
    if not recipe.scorer.is_mass:
        raise RecipeError(
            f"criticalkv multiplies scores by a norm, which means nothing for {recipe.scorer.name} scores: they may be "
            "negative. Use a base whose scores are attention (snapkv, h2o, expected_attention, adakv over these)."
        )
    norm = not getattr(recipe.scorer, "value_norm", False)
    return recipe.with_options(refine=OutputAware(first, epsilon, norm))
