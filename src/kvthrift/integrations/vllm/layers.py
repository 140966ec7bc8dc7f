"""Budgets that differ from layer to layer, as classes of layers that a server keeps block tables for.

Knows nothing of vLLM. Only allocators that need to know no more than the prompt's length can be asked: the scheduler
sees no scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kvthrift.allocate import BudgetLayers, LayerAllocator
from kvthrift.core import LayerView
from kvthrift.errors import OptionError
from kvthrift.integrations.vllm.plan import Policy
from kvthrift.recipe import Recipe

MOST = 8  # classes: each is a block table more for every request
_LONG = 1_000_000  # tokens


@dataclass(frozen=True)
class Run:
    """The mean of a run of layers, rounded up, under an allocator that looks at the prompt's length alone.

    Attributes:
        allocator: of the recipe.
        layers: of the model.
        members: indices of the run's layers.
        least: tokens per KV head that are always kept.
    """

    allocator: LayerAllocator
    layers: int
    members: tuple[int, ...]
    least: int

    def entries(self, prompt: int, mean: int) -> int:
        """Tokens per KV head that each layer of the run keeps of a prompt of so many tokens."""
        found = [_entries(self.allocator, layer, self.layers, prompt, mean, self.least) for layer in self.members]
        return -(-sum(found) // len(found))


@lru_cache(1 << 16)
def _entries(allocator: LayerAllocator, layer: int, layers: int, prompt: int, mean: int, least: int) -> int:
    none = torch.empty(1, 1, 0, 1)
    view = LayerView(
        layer=layer,
        layers=layers,
        keys=none,
        values=none,
        positions=torch.empty(1, 1, 0, dtype=torch.long),
        lengths=torch.zeros(1, 1, dtype=torch.long),
        seen=torch.tensor([prompt]),
        scale=1.0,
    )
    return int(allocator.total(view, torch.tensor([mean]), least)[0])


def answers_beforehand(allocator: LayerAllocator) -> bool:
    """Whether a layer's budget follows from the prompt's length."""
    own = type(allocator).total is not LayerAllocator.total
    return own and allocator.scope == "layer" and not (allocator.decides or allocator.gives_heads)


def runs(recipe: Recipe, layers: int, groups: int | None) -> tuple[Run, ...]:
    """The classes of a recipe's layers, in order of their first layer.

    Args:
        recipe: whose layers part gives unequal budgets.
        layers: of the model.
        groups: runs of as many neighbouring layers each, which share their mean; None for one class a budget.

    Raises:
        OptionError: ``groups`` does not divide the layers, or there are too many budgets for a class each.
    """
    least = recipe.protect.entries
    if groups is None:
        found = _alike(recipe.layers, layers, least)
        if len(found) > MOST:
            raise OptionError(
                f"recipe {recipe.name} gives {layers} layers {len(found)} different budgets, and a server keeps at "
                f'most {MOST} block tables for a request. Give "groups" (--groups): so many runs of neighbouring '
                "layers, each with its layers' mean."
            )
        return found
    if groups > MOST or layers % groups:
        fitting = ", ".join(str(n) for n in range(1, MOST + 1) if layers % n == 0)
        raise OptionError(f"groups={groups} must be at most {MOST} and divide {layers} layers: {fitting}.")
    size = layers // groups
    members = [tuple(range(n * size, (n + 1) * size)) for n in range(groups)]
    return tuple(Run(recipe.layers, layers, each, least) for each in members)


def _alike(allocator: LayerAllocator, layers: int, least: int) -> tuple[Run, ...]:
    """Layers for which the same is listed; of an allocator without a list, every layer by itself."""
    listed = allocator.entries if isinstance(allocator, BudgetLayers) else tuple(range(layers))
    classes: dict[int, list[int]] = {}
    for layer in range(layers):
        classes.setdefault(listed[layer] if layer < len(listed) else 0, []).append(layer)
    return tuple(Run(allocator, layers, tuple(members), least) for members in classes.values())


def policies(recipe: Recipe, policy: Policy, layers: int, groups: int | None) -> tuple[Policy, ...]:
    """The policy of every layer; layers of one class have the same."""
    if recipe.layers.name == "uniform":
        if groups is not None:
            raise OptionError(f"groups={groups} is for recipes with unequal layers; those of {recipe.name} are equal.")
        return (policy,) * layers
    found = [policy] * layers
    for run in runs(recipe, layers, groups):
        run.entries(_LONG, policy.mean(_LONG))  # a list for another model is refused here
        for layer in run.members:
            found[layer] = replace(policy, layer=run)
    return tuple(found)
