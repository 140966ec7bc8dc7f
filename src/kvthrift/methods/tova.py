"""TOVA (2401.06104): what the newest token attends to, one choice for all heads of a layer."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import LastQuery


@published("tova", title="TOVA", paper="2401.06104")
def tova(decode: bool = False) -> Recipe:
    """Keeps what the last token attends to, averaged over all heads, so that heads agree.

    Args:
        decode: drop the least attended token at every decoded token too, as the paper does.
    """
    return Recipe("tova", scorer=LastQuery(), protect=Protect(recent=1), trigger=Trigger(every=1 if decode else None))
