"""KVzap (2601.07891): what KVzip's second pass would find, foretold from each entry by itself."""

from typing import Literal

from kvthrift.allocate import AdaptiveHeads, PoolLayers, TableHeads
from kvthrift.calibrate import load_named
from kvthrift.calibrate.heads import KIND as IMPORTANCE
from kvthrift.calibrate.heads import importance
from kvthrift.calibrate.surrogate import KIND, weights_of
from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import LinearSurrogate
from kvthrift.score.surrogate import pack


@published("kvzap", title="KVzap (linear, keys and values)", paper="2601.07891")
def kvzap(
    calibration: str = "smollm2",
    window: int = 32,
    sinks: int = 0,
    budgets: Literal["pooled", "headkv", "heads", "uniform"] = "pooled",
    heads: str = "smollm2",
    skew: float = 2.0,
) -> Recipe:
    """Keeps what a linear map of key and value says that a repetition of the context would look at.

    One pass, no queries. Departs from the paper, which maps a layer's hidden states by a small network to KVzip+ scores
    and drops what falls below a threshold: an attention interface is not given hidden states, so each head has a linear
    map of its own keys (before rotation) and values, fitted to the logarithm of KVzip's scores, and the budget is
    exact.

    Args:
        calibration: "smollm2", shipped for the embedded model, or a file from 'kvthrift calibrate kvzap'.
        window: newest entries that stay; 128 in the paper, whose caches are larger.
        sinks: first entries that stay; the paper protects none.
        budgets: the highest scores of the model (which holds the prompt's whole cache until the last layer); room by
            HeadKV's importance of every head, filled by these scores, which no paper has; the highest scores of each
            layer, or of each head.
        heads: a calibration for headkv, as that method takes it; used for ``budgets="headkv"`` only.
        skew: the power that importance is raised to there.
    """
    require(skew > 0, f"skew={skew} must be above 0.")
    table = load_named(calibration, method="kvzap", kind=KIND)
    meta, shares = table.meta, load_named(heads, method="headkv", kind=IMPORTANCE)
    recipe = Recipe(
        "kvzap",
        scorer=LinearSurrogate(pack(weights_of(table)), meta.layers, meta.kv_heads, meta.model),
        protect=Protect(sinks=sinks, recent=window),
    )
    if budgets == "pooled":
        return recipe.with_options(layers=PoolLayers())
    if budgets == "headkv":
        steep = tuple(tuple(float(x**skew) for x in row) for row in importance(shares))
        return recipe.with_options(heads=TableHeads(steep, 1.01, protected=window, model=shares.meta.model))
    return recipe.with_options(heads=AdaptiveHeads()) if budgets == "heads" else recipe
