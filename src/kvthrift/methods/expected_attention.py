"""Expected Attention (2510.00636): what queries still to come should attend to."""

from typing import Literal

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import ExpectedAttention


@published("expected_attention", title="Expected Attention", paper="2510.00636")
def expected_attention(
    future: int = 512,
    sinks: int = 4,
    epsilon: float = 0.0,
    covariance: bool = True,
    value_norm: bool = True,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Keeps what Gaussian queries at the next positions are expected to attend to, times the value norm.

    Args:
        future: positions ahead that are averaged over.
        sinks: first tokens that stay, and whose queries are left out of the statistics.
        epsilon: added to the expected attention before the value norm (1e-2 in the strongest published combination).
        covariance: use the queries' covariance, not only their mean.
        value_norm: multiply by the L2 norm of the value.
        group: how the query heads of a KV head are joined.
    """
    return Recipe(
        "expected_attention",
        scorer=ExpectedAttention(future, sinks, epsilon, covariance, value_norm, group),
        protect=Protect(sinks=sinks),
    )
