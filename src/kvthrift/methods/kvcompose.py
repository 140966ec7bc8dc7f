"""KVCompose (2509.05165): heads choose for themselves, layers compete with the tokens composed of their choices."""

from typing import Literal

from kvthrift.allocate import CompositeLayers, PoolLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Recipe
from kvthrift.score import SecondPassAttention


@published("kvcompose", title="KVCompose", paper="2509.05165")
def kvcompose(
    queries: Literal["max", "mean"] = "max",
    group: Literal["max", "mean"] = "mean",
    composite: Literal["max", "mean"] = "mean",
    value_norm: bool = False,
    across_heads: bool = True,
    first_most: bool = True,
    floor: int = 1,
    structured: bool = True,
    probe: tuple[int, ...] = (),
) -> Recipe:
    """Keeps as many entries in every head of a layer, each head its own; layers share the room by their composites.

    Needs ``kvthrift.prefill``: the context is fed once more behind itself, in one pass and without a request, and only
    that pass is looked at. That this is the probe of the paper's main tables, and that it adds the mean over heads and
    lets the first layer keep the most, is what its code says.

    Args:
        queries: how attention is joined over the tokens that are fed.
        group: how the query heads of a KV head are joined.
        composite: how heads' scores of the same rank make the score that a layer competes with.
        value_norm: multiply by the norm of the value.
        across_heads: add the mean over the layer's heads.
        first_most: the first layer keeps at least as many as any other.
        floor: entries that every head keeps at least.
        structured: as many in every head of a layer; else the highest scores of the model, whichever head they are in.
        probe: token ids that are fed in place of the context, its task-aware form: prompts of the task, one behind the
            other (as its code feeds them, each sees those before it).
    """
    scorer = SecondPassAttention(
        0, "all", queries, group, instructed=False, probe=probe, value_norm=value_norm, across_heads=across_heads
    )
    layers = CompositeLayers(first_most, floor, composite)
    return Recipe("kvcompose", scorer=scorer, layers=layers if structured else PoolLayers())
