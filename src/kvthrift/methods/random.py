"""Random eviction: the control that says what a budget is worth without any idea."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import Uninformed


@published("random", title="Random eviction")
def random(seed: int = 0, sinks: int = 4, recent: int = 32) -> Recipe:
    """Keeps random entries behind a few sinks and the newest ones: a control.

    Args:
        seed: makes the draw repeatable.
        sinks: first tokens that stay.
        recent: newest entries that stay.
    """
    return Recipe("random", scorer=Uninformed(seed), protect=Protect(sinks, recent))
