"""DBudgetKV (2502.16886): no budget is given; a layer stops dropping when the last query would miss it."""

from typing import Literal

from kvthrift.allocate import LossStop
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import Recency, WindowAttention


@published("dbudgetkv", title="DBudgetKV", paper="2502.16886")
def dbudgetkv(
    loss: float = 0.01,
    sinks: int = 4,
    ranking: Literal["position", "attention"] = "position",
    window: int = 8,
    queries: int = 1,
) -> Recipe:
    """Keeps sinks and a suffix, as short as the last query's attention allows, with the same count in all heads.

    How much stays is found for each layer and text; a report's ``kept`` says how much that was. A budget is an upper
    limit: a text that fits it stays whole. Layers 0 and 1 stay whole (``skip``), as in the paper. That it keeps 4 sinks
    and looks at the last row alone is read from its code. Facts in the middle that the last query does not look at yet
    are lost.

    Args:
        loss: share of the norm of the last query's attention, sinks aside, that may go (1% with positions, 5% with
            attention).
        sinks: leading tokens that stay.
        ranking: the oldest go first; or those with the least attention from a window of newest queries, which stays.
        window: newest queries that rank by attention.
        queries: last queries whose rows are added up for the norm (the paper's is the very last).
    """
    attended = WindowAttention(window, queries="sum", pool="none")
    recent = 0 if ranking == "position" else window
    return Recipe(
        "dbudgetkv",
        scorer=attended if recent else Recency(),
        layers=LossStop(loss, sinks, queries),
        protect=Protect(sinks, recent),
        skip=(0, 1),
    )
