"""LagKV (2504.04704): how a token stands out against the partition that follows it."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import LagRelative


@published("lagkv", title="LagKV", paper="2504.04704")
def lagkv(sinks: int = 4, lag: int = 128) -> Recipe:
    """Keeps, in every partition, the tokens that stand out against the next one; needs no queries.

    Args:
        sinks: first tokens that stay.
        lag: entries of a partition.
    """
    return Recipe("lagkv", scorer=LagRelative(sinks, lag), protect=Protect(sinks=sinks))
