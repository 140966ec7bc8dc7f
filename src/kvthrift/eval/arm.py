"""The arms of a comparison: every method at every budget, and the controls that are always beside them.

Knows methods by name and recipes by their plain form; knows nothing of models or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from zlib import crc32

import torch

from kvthrift.budget import Budget
from kvthrift.errors import RecipeError, UnknownNameError
from kvthrift.eval.config import Grid
from kvthrift.methods import method, methods
from kvthrift.part import Part
from kvthrift.recipe import Recipe
from kvthrift.runtime.compress import check_floor

FULL = "full"
SEED = "seed"
CONTROLS = ("random", "streamingllm")


@dataclass(frozen=True)
class Arm:
    """One recipe in a comparison.

    Attributes:
        name: unique in the grid: ``snapkv@512``.
        recipe: what it does.
        control: whether it is there to be compared with.
    """

    name: str
    recipe: Recipe
    control: bool = False

    @property
    def budget(self) -> str:
        """As it was asked for; "all" for the full cache, "own" for one that finds its own."""
        return str(self.recipe.budget or ("own" if self.recipe.compresses else "all"))


def arms(grid: Grid) -> tuple[Arm, ...]:
    """The full cache, the controls at every budget that a method has, then the methods.

    Raises:
        UnknownNameError: no such method or option.
        BudgetError: a budget cannot be read, or is below what a method protects.
        RecipeError: a recipe cannot be built, or two arms would have one name.
        CalibrationError: a method needs a calibration that is not there.
    """
    for name in grid.options:
        if name not in methods():
            raise UnknownNameError("method in options:", name, methods())
    wanted = [*_methods(grid), *_recipes(grid)]
    names = {arm.name for arm in wanted}
    budgets = dict.fromkeys(arm.recipe.budget for arm in wanted if arm.recipe.budget is not None)
    controls = [_arm(name, grid, budget, control=True) for name in CONTROLS for budget in budgets]
    found = [Arm(FULL, method(FULL), control=True), *(arm for arm in controls if arm.name not in names), *wanted]
    _refuse_doubles(found)
    for arm in found:
        _refuse_floor(arm)
    return tuple(found)


def redrawn(arm: Arm, label: str) -> Arm:
    """The arm with every part that draws by chance drawing anew for a label, the same for the same label.

    Random eviction draws by position; with one seed it would keep the same places of every sample.
    """
    recipe = arm.recipe
    parts = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    chance = {
        name: replace(part, **{SEED: crc32(f"{getattr(part, SEED)}/{label}".encode())})
        for name, part in parts.items()
        if isinstance(part, Part) and isinstance(getattr(part, SEED, None), int)
    }
    return replace(arm, recipe=recipe.with_options(**chance)) if chance else arm


def _methods(grid: Grid) -> Iterator[Arm]:
    for name in grid.methods:
        own = _arm(name, grid, None, control=False) if name in methods() and name != FULL else None
        if own is not None and own.recipe.layers.decides:
            yield own
        elif name != FULL:
            yield from (_arm(name, grid, Budget.parse(text), control=name in CONTROLS) for text in grid.budgets)


def _arm(name: str, grid: Grid, budget: Budget | None, *, control: bool) -> Arm:
    return Arm(f"{name}@{budget or 'own'}", method(name, budget=budget, **grid.options.get(name, {})), control)


def _recipes(grid: Grid) -> Iterator[Arm]:
    for file in grid.recipes:
        recipe = Recipe.load(file)
        if recipe.layers.decides and recipe.budget is None:
            yield Arm(f"{recipe.name}@own", recipe)
            continue
        budgets = [recipe.budget] if recipe.budget is not None else [Budget.parse(text) for text in grid.budgets]
        yield from (Arm(f"{recipe.name}@{budget}", recipe.with_options(budget=budget)) for budget in budgets)


def _refuse_doubles(found: list[Arm]) -> None:
    names = [arm.name for arm in found]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise RecipeError(
            f"two arms would be called {', '.join(doubles)}, so their rows could not be told apart. Change the name "
            "in one of the recipe files, or leave one out."
        )


def _refuse_floor(arm: Arm) -> None:
    budget = arm.recipe.budget
    if budget is not None and budget.unit == "entries":
        check_floor(arm.recipe, torch.tensor([int(budget.amount)]))
