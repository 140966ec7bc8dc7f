"""No compression: the reference every other method is held against."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Recipe
from kvthrift.score import Recency


@published("full", title="Full cache")
def full() -> Recipe:
    """Keeps everything; the reference."""
    return Recipe("full", scorer=Recency())
