"""From what was typed to a recipe: a method with options, or a recipe file. Knows nothing of models or texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvthrift.budget import Budget
from kvthrift.errors import OptionError, RecipeError
from kvthrift.methods import method
from kvthrift.recipe import Recipe

DEFAULT_METHOD = "snapkv"
DEFAULT_BUDGET = "512"


def key_values(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``key=value`` texts.

    Raises:
        OptionError: a text has no ``=``, or a key comes twice.
    """
    out: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise OptionError(f"--option {pair!r} has no value, so it sets nothing. Write it as key=value.")
        if key in out:
            raise OptionError(f"--option {key} is given twice, so its value is not clear. Give it once.")
        out[key] = value.strip()
    return out


def choose_recipe(
    *,
    name: str | None,
    options: Sequence[str],
    file: str | None,
    budget: str | None,
    every: int | None,
    merge: str | None,
) -> Recipe:
    """The recipe of a method (by default SnapKV with 512 entries a head), or that of a file.

    Raises:
        RecipeError: both are given, or either cannot be honoured.
        BudgetError: the budget cannot be read.
    """
    flags = {"budget": budget, "every": every, "merge": merge}
    common = {key: value for key, value in flags.items() if value is not None}
    if file is not None:
        return _from_file(file, name, options, common)
    return _from_method(name or DEFAULT_METHOD, key_values(options), common)


def choose_recipes(*, names: str, **shared: Any) -> tuple[Recipe, ...]:
    """The recipes of several methods, ``names`` with commas between them, under the same flags.

    Args:
        shared: as for :func:`choose_recipe`.

    Raises:
        RecipeError: no method is named, one method or recipe is asked for besides, or a flag cannot be honoured.
        BudgetError: the budget cannot be read.
    """
    given = {"--method": shared["name"], "--recipe": shared["file"], "--option": shared["options"]}
    clash = [flag for flag, value in given.items() if value]
    if clash:
        raise OptionError(f"--methods names several methods, and {clash[0]} belongs to one. Leave out one of them.")
    wanted = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    if not wanted:
        raise OptionError("--methods names none, so there is nothing to show. Write it as --methods snapkv,adakv.")
    return tuple(choose_recipe(**{**shared, "name": name}) for name in wanted)


def _from_method(name: str, options: dict[str, str], common: dict[str, Any]) -> Recipe:
    twice = sorted(set(options) & set(common))
    if twice:
        raise OptionError(f"--{twice[0]} and --option {twice[0]} say the same thing. Give one of them.")
    values: dict[str, Any] = {**options, **common}
    if name != "full":
        values.setdefault("budget", DEFAULT_BUDGET)
    return method(name, **values)


def _from_file(file: str, name: str | None, options: Sequence[str], common: dict[str, Any]) -> Recipe:
    given = {
        "--method": name,
        "--option": options,
        "--every": common.get("every"),
        "--merge": common.get("merge"),
    }
    clash = [flag for flag, value in given.items() if value]
    if clash:
        raise RecipeError(
            f"--recipe is a complete recipe, which {' and '.join(clash)} would contradict. Give one or the other, or "
            "change the file."
        )
    recipe = Recipe.load(file)
    return recipe.with_options(budget=Budget.parse(common["budget"])) if "budget" in common else recipe
