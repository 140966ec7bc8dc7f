"""AdaKV (2407.11550): the heads of a layer compete for its room, over any method's scores."""

from kvthrift.allocate import AdaptiveHeads
from kvthrift.methods.registry import base_recipe, published
from kvthrift.recipe import Recipe


@published("adakv", title="AdaKV", paper="2407.11550")
def adakv(base: str = "snapkv", safeguard: float = 0.2, blend: float | None = None) -> Recipe:
    """Gives each head of a layer as much room as its scores win; heads really differ in length, and memory is freed.

    Scores of different heads are compared as they are, which suits attention masses better than norms or cosines.

    Args:
        base: the method whose scores compete.
        safeguard: share of the mean budget that every head keeps first.
        blend: the paper's other form: this share competitive, the rest uniform (0.5 there).
    """
    return base_recipe(base, "adakv").with_options(heads=AdaptiveHeads(safeguard, blend))
