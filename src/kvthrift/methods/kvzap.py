"""KVzap (2601.07891): what KVzip's second pass would find, foretold from each entry by itself."""

from typing import Literal

from kvthrift.allocate import AdaptiveHeads, PoolLayers, TableHeads, ThresholdHeads, ThresholdLayers
from kvthrift.calibrate import load_named
from kvthrift.calibrate.heads import KIND as IMPORTANCE
from kvthrift.calibrate.heads import importance
from kvthrift.calibrate.surrogate import KIND, network_of, weights_of
from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import LinearSurrogate, NetworkSurrogate, Scorer
from kvthrift.score.surrogate import pack


@published("kvzap", title="KVzap (linear, keys and values)", paper="2601.07891")
def kvzap(
    calibration: str = "smollm2",
    window: int = 32,
    sinks: int = 0,
    budgets: Literal["pooled", "headkv", "heads", "uniform", "threshold"] = "pooled",
    heads: str = "smollm2",
    skew: float = 2.0,
    threshold: float = -6.0,
) -> Recipe:
    """Keeps what a linear map of key and value says that a repetition of the context would look at.

    One pass, no queries. Departs from the paper, which maps a layer's hidden states by a small network to KVzip+
    scores: an attention interface is not given hidden states, so each head has a linear map of its own keys (before
    rotation) and values, fitted to the logarithm of KVzip's scores (or KVzip+'s, see ``calibration``); or, from a file
    of 'kvthrift calibrate kvzap --form mlp', a network of them with one hidden layer (of passages of the shipped text
    that neither was fitted to, it explains 64% of the variance of SmolLM2's log scores, a linear map 56%).
    ``budgets="threshold"`` is the published rule: what is foretold to score less goes, and how much that is depends on
    the text; no budget is needed, one that is given is an upper limit for each layer. With ``every=1`` it also holds
    while decoding, for entries behind the window. The other forms meet a budget exactly.

    Args:
        calibration: "smollm2" or "smollm2-plus", shipped for the embedded model, or a file from 'kvthrift calibrate
            kvzap' or 'kvzap-plus'; the plus ones foretell KVzip+ scores, as the paper does.
        window: newest entries that stay; 128 in the paper, whose caches are larger.
        sinks: first entries that stay; the paper protects none.
        budgets: the highest scores of the model (which holds the prompt's whole cache until the last layer); room by
            HeadKV's importance of every head, filled by these scores, which no paper has; the highest scores of each
            layer, or of each head; or all scores above ``threshold``, as published.
        heads: a calibration for headkv, as that method takes it; used for ``budgets="headkv"`` only.
        skew: the power that importance is raised to there.
        threshold: the logarithm of the least score that stays, for ``budgets="threshold"`` only; higher keeps less.
            The paper's are -6 to -3 (Qwen3) and -9 to -6 (Llama 3.1), of KVzip+ scores. Of 2000 tokens of the shipped
            text, "smollm2" keeps 65% at -6 and 21% at -4, "smollm2-plus" 89% at -9 and 23% at -6.
    """
    require(skew > 0, f"skew={skew} must be above 0.")
    require(threshold == threshold, f"threshold={threshold} must be a number.")
    table = load_named(calibration, method="kvzap", kind=KIND)
    meta, shares = table.meta, load_named(heads, method="headkv", kind=IMPORTANCE)
    network, sizes = network_of(table), (meta.layers, meta.kv_heads)
    scorer: Scorer = (
        LinearSurrogate(pack(weights_of(table)), *sizes, meta.model)
        if network is None
        else NetworkSurrogate(pack(network[0]), *sizes, network[1], meta.model)
    )
    recipe = Recipe(
        "kvzap",
        scorer=scorer,
        protect=Protect(sinks=sinks, recent=window),
    )
    if budgets == "threshold":
        return recipe.with_options(layers=ThresholdLayers(threshold), heads=ThresholdHeads(threshold))
    if budgets == "pooled":
        return recipe.with_options(layers=PoolLayers())
    if budgets == "headkv":
        steep = tuple(tuple(float(x**skew) for x in row) for row in importance(shares))
        return recipe.with_options(heads=TableHeads(steep, 1.01, protected=window, model=shares.meta.model))
    return recipe.with_options(heads=AdaptiveHeads()) if budgets == "heads" else recipe
