"""From a recipe, a model and what is to vary, to the space that is searched.

The one place of a search that looks at a model's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvthrift.allocate import BudgetLayers
from kvthrift.allocate.listed import completed
from kvthrift.errors import OptionError, RecipeError
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.part import require
from kvthrift.recipe import Recipe
from kvthrift.runtime.compress import check_floor
from kvthrift.store import entry_and_head_bytes
from kvthrift.tune.aim import Aim
from kvthrift.tune.options import Dim, numeric_options, option_dim
from kvthrift.tune.space import BUDGET, Layers, Space, check_layers, layer_dims

LAYERS, OPTIONS = "layers", "options"


def plan(
    model: PreTrainedModel,
    recipe: Recipe,
    aim: Aim,
    vary: Sequence[str],
    *,
    longest: int,
    page: int,
    group: int,
    free: bool,
) -> Space:
    """The space of a search.

    Args:
        model: whose layers share the budget.
        recipe: where it starts, with a budget.
        aim: whether the whole budget may shrink.
        vary: "layers", "options" (all numeric ones), an option's path ("scorer.kernel"), or one with its range
            ("scorer.kernel=3:15"); empty for all there is.
        longest: tokens of the longest prompt.
        page: entries a page of the store.
        group: layers that are searched together, or share a dimension.
        free: whether each layer's budget is searched by itself; see :class:`Layers`.

    Raises:
        RecipeError: there is nothing to vary, or the recipe decides its own layers.
        BudgetError: the budget is below what the recipe protects, or not above what a prompt has.
        OptionError: a range that cannot be.
    """
    if recipe.budget is None:
        what = "finds its own budget" if recipe.layers.decides else "keeps everything"
        raise RecipeError(
            f"recipe {recipe.name} {what}, so there is nothing to tune. Give a budget, or another method."
        )
    require(group >= 1, f"group={group} must be at least 1 layer.")
    cache = Cache(model.config, recipe, page=page)
    target = _target(model, cache, recipe, longest, page)
    check_floor(recipe, torch.tensor([target]))
    if target >= longest:
        raise OptionError(
            f"budget {recipe.budget} comes to {target} entries a head and the longest prompt has {longest} tokens, so "
            "nothing goes and every recipe is the same. Give a smaller budget or longer prompts."
        )
    layers = None
    if LAYERS in vary or (not vary and _own_layers(recipe)):
        check_layers(recipe)
        step = page if recipe.budget.unit == "bytes" else 1
        floor = max(-(-max(recipe.protect.entries, 1) // step) * step, step)
        numbers = tuple(layer.number for layer in cache.state.layers if not layer.whole)
        layers = Layers(numbers, cache.fingerprint, floor, max(longest, target), step, group, free)
    dims = _option_dims(recipe, [name for name in vary if name != LAYERS], every=not vary, target=target)
    if layers is not None:
        dims = [*layer_dims(layers, target, _now(recipe, layers, target)), *dims]
    if aim.shrinks and not (layers is not None and layers.free):
        least = max(recipe.protect.entries + 1, layers.floor if layers else 1)
        dims.append(Dim(BUDGET, min(least, target), target, target, True, True))
    dims = [dim for dim in dims if dim.low < dim.high]
    if not dims:
        raise RecipeError(
            f"recipe {recipe.name} has nothing to tune: no numeric option, and its budgets by layer are not varied. "
            "Vary layers, or take another method."
        )
    return Space(recipe, target, tuple(dims), layers)


def _own_layers(recipe: Recipe) -> bool:
    try:
        check_layers(recipe)
    except RecipeError:
        return False
    return True


def _target(model: PreTrainedModel, cache: Cache, recipe: Recipe, longest: int, page: int) -> int:
    """Entries per head and layer that the budget comes to."""
    budget = recipe.budget
    assert budget is not None
    if budget.unit == "entries":
        return int(budget.amount)
    with torch.inference_mode():  # a few tokens, to see the sizes of an entry
        probe = Cache(model.config, "full", page=page)
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=probe, use_cache=True)
    layer = next(layer for layer in probe.state.layers if layer.store is not None)
    store = layer.store
    assert store is not None
    planes = int(recipe.needs.columns) + len(recipe.needs.powers) + int(recipe.merge.biased)
    form = None if recipe.codec is None else recipe.codec.format
    size, fixed = entry_and_head_bytes(store.shape, store.dtype, page, form)
    heads = cache.state.layer_count * store.shape.kv_heads
    return budget.entries(longest, heads=heads, entry_bytes=size + 4 * (1 + planes), page=page, head_bytes=fixed)


def _now(recipe: Recipe, layers: Layers, target: int) -> dict[int, int]:
    listed = recipe.layers.entries if isinstance(recipe.layers, BudgetLayers) else ()
    weights = [listed[n] if n < len(listed) else 1 for n in layers.numbers] if listed else [1] * len(layers.numbers)
    found = completed(weights, target, floor=layers.floor, step=layers.step)
    return dict(zip(layers.numbers, found.tolist(), strict=True))


def _option_dims(recipe: Recipe, names: Sequence[str], *, every: bool, target: int) -> list[Dim]:
    out: dict[str, Dim] = {}
    if every or OPTIONS in names:
        for path in numeric_options(recipe):
            try:
                out[path] = option_dim(recipe, path)
            except OptionError:  # this one has no room
                continue
    for name in names:
        if name != OPTIONS:
            path, equals, ends = name.partition("=")
            out[path] = option_dim(recipe, path, *(_range(name, ends) if equals else (None, None)))
    return [_below(dim, target) for dim in out.values()]


def _below(dim: Dim, target: int) -> Dim:
    """Protected entries leave room for one that is chosen."""
    if not dim.name.startswith("protect."):
        return dim
    return Dim(dim.name, dim.low, max(min(dim.high, target // 2), dim.start), dim.start, dim.whole)


def _range(name: str, text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise OptionError(f"--vary {name!r} is no range. Write it as option=LOW:HIGH.") from None
    return low, high
