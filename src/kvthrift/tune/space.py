"""What of a recipe may vary: the numeric options its parts declare, its budgets layer by layer, its whole budget.

Knows parts by their options and a model by its number of layers; nothing of prompts or search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvthrift.allocate import BudgetLayers, UniformLayers
from kvthrift.allocate.listed import completed
from kvthrift.budget import Budget
from kvthrift.errors import RecipeError
from kvthrift.recipe import Recipe
from kvthrift.tune.options import Dim, snapped

LAYER, BUDGET = "layer.", "budget"

Values = dict[str, float]
"""A place in a space: name of a dimension -> its value in the option's own unit, or entries."""


@dataclass(frozen=True)
class Layers:
    """Budgets by layer.

    Attributes:
        numbers: the model's own numbers of the compressed layers.
        model: fingerprint of the model.
        floor, most: the least and the most entries of a layer.
        step: budgets are multiples of this many entries.
        group: layers in a row that a dimension stands for, or that are searched together.
        free: whether each layer has a dimension and the mean is what comes of it; else one a group, scaled to the mean.
    """

    numbers: tuple[int, ...]
    model: str
    floor: int
    most: int
    step: int
    group: int
    free: bool


@dataclass(frozen=True)
class Space:
    """All recipes that a search may try.

    Attributes:
        base: the recipe it starts from, with its budget.
        target: entries per head and layer that the budget comes to.
        dims: what varies.
        layers: how budgets by layer vary; None if they do not.
    """

    base: Recipe
    target: int
    dims: tuple[Dim, ...]
    layers: Layers | None = None

    @property
    def start(self) -> Values:
        """Where the base is."""
        return {dim.name: dim.start for dim in self.dims}

    @property
    def corners(self) -> list[Recipe]:
        """The base and, for each option, the base with the least and the most of it: what any recipe looks at."""
        ends = ({dim.name: end} for dim in self.dims if not _roomy(dim.name) for end in (dim.low, dim.high))
        return [self.base, *(self.recipe({**self.start, **end}) for end in ends)]

    def mean(self, values: Values) -> int:
        """Entries per head and layer, rounded up, at a place."""
        if self.layers is not None and self.layers.free:
            table = self.table(values)
            return -(-sum(table) // len(table))
        return int(values.get(BUDGET, self.target))

    def table(self, values: Values) -> list[int]:
        """Entries per head of each compressed layer at a place."""
        layers = self.layers
        if layers is None:
            return []
        if layers.free:
            wanted = (round(values[f"{LAYER}{n}"] / layers.step) * layers.step for n in layers.numbers)
            return [min(max(count, layers.floor), layers.most) for count in wanted]
        weights = [values[dim.name] for dim in self.dims if dim.name.startswith(LAYER)]
        spread = [weights[place // layers.group] for place in range(len(layers.numbers))]
        mean = max(self.mean(values) // layers.step * layers.step, layers.floor)
        return list(map(int, completed(spread, mean, floor=layers.floor, step=layers.step)))

    def recipe(self, values: Values) -> Recipe:
        """The recipe at a place.

        Raises:
            KvthriftError: options that do not go together.
        """
        found = self._with_options(values)
        if self.layers is None:
            return found.with_options(budget=_entries(values[BUDGET])) if BUDGET in values else found
        return self._listed(found, self.table(values), _entries(self.mean(values)))

    def completed(self, values: Values) -> Recipe:
        """The recipe at a place with its budgets by layer scaled to the target, and the budget that was asked for."""
        if self.layers is None:
            return self.recipe(values)
        table = completed(self.table(values), self.target, floor=self.layers.floor, step=self.layers.step)
        return self._listed(self._with_options(values), table.tolist(), self.base.budget)

    def _with_options(self, values: Values) -> Recipe:
        found = self.base
        for dim in self.dims:
            if not _roomy(dim.name):
                found = snapped(found, dim, values[dim.name])
        return found

    def _listed(self, recipe: Recipe, table: Sequence[int], budget: Budget | None) -> Recipe:
        assert self.layers is not None
        entries = [0] * (self.layers.numbers[-1] + 1)
        for number, count in zip(self.layers.numbers, table, strict=True):
            entries[number] = count
        return recipe.with_options(layers=BudgetLayers(tuple(entries), self.layers.model), budget=budget)


def _roomy(name: str) -> bool:
    return name.startswith(LAYER) or name == BUDGET


def _entries(count: float) -> Budget:
    return Budget(Fraction(int(count)), "entries")


def check_layers(recipe: Recipe) -> None:
    """Refuse to give layers of their own budgets where something else does.

    Raises:
        RecipeError: it does.
    """
    if recipe.heads.modelwide:
        raise RecipeError(
            f"recipe {recipe.name} shares room out over the heads of all layers (heads={recipe.heads.name}), so there "
            "are no budgets by layer to search. Vary its options, or take a recipe that gives all heads the same."
        )
    if not isinstance(recipe.layers, (UniformLayers, BudgetLayers)) or recipe.reuse > 1:
        what = f"reuse={recipe.reuse}" if recipe.reuse > 1 else f"layers={recipe.layers.name}"
        raise RecipeError(
            f"recipe {recipe.name} decides budgets by layer itself ({what}), so there are none to search. Vary its "
            "options, or take a recipe that gives all layers the same."
        )


def layer_dims(layers: Layers, target: int, now: Mapping[int, int]) -> list[Dim]:
    """A dimension for each layer, or for each group of them where the mean is given.

    Args:
        layers: which, and how.
        target: entries per head and layer.
        now: entries of each layer as the recipe stands, by the model's own number.
    """
    if layers.free:
        return [Dim(f"{LAYER}{n}", layers.floor, layers.most, now[n], True) for n in layers.numbers]
    groups = [layers.numbers[at : at + layers.group] for at in range(0, len(layers.numbers), layers.group)]
    names = [f"{LAYER}{group[0]}-{group[-1]}" if len(group) > 1 else f"{LAYER}{group[0]}" for group in groups]
    shares = [sum(now[n] for n in group) / len(group) / target for group in groups]
    return [
        Dim(name, min(0.2, share), max(5.0, share), share, False, True)
        for name, share in zip(names, shares, strict=True)
    ]
