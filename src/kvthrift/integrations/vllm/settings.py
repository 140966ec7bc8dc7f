"""What an engine was asked for: ``additional_config["kvthrift"]`` read, and refused where a server cannot do it.

Knows nothing of vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvthrift.budget import Budget
from kvthrift.core import Signals
from kvthrift.errors import OptionError, RecipeError
from kvthrift.integrations.vllm.plan import Policy
from kvthrift.methods import method
from kvthrift.recipe import Recipe

KEY = "kvthrift"


@dataclass(frozen=True)
class Settings:
    """A recipe as a server follows it.

    Attributes:
        recipe: what to keep.
        policy: how much, in blocks.
        layers: of the model.
        check: whether scheduler and worker counts are compared at every step.
    """

    recipe: Recipe
    policy: Policy
    layers: int
    check: bool = False


def read_settings(config: Mapping[str, Any], *, layers: int, kv_heads: int, entry_bytes: int) -> Settings | None:
    """Settings from an engine's additional config; None where kvthrift was not asked for.

    Args:
        config: the whole additional config; ``config["kvthrift"]`` has ``method`` (with ``budget`` and the method's
            options) or ``recipe`` (a file, or what is in one), and may have ``check``.
        layers, kv_heads, entry_bytes: of the model, for budgets in bytes (of one request).

    Raises:
        RecipeError: no such method or option, or something that a server cannot give; the message says what can.
        BudgetError: the budget cannot be read.
    """
    if KEY not in config:
        return None
    given = config[KEY]
    if not isinstance(given, Mapping):
        raise OptionError(
            f'additional config "{KEY}" must be an object such as {{"method": "snapkv", "budget": 1024}}.'
        )
    words = dict(given)
    check = words.pop("check", False)
    if not isinstance(check, bool):
        raise OptionError("check= is true or false.")
    recipe = _recipe(words)
    refuse(recipe)
    return Settings(recipe, _policy(recipe, layers * kv_heads * entry_bytes), layers, check)


def _recipe(words: dict[str, Any]) -> Recipe:
    file, name = words.pop("recipe", None), words.pop("method", None)
    if (file is None) == (name is None):
        raise OptionError(f'additional config "{KEY}" needs either "method" or "recipe".')
    if file is not None:
        recipe = Recipe.from_plain(dict(file)) if isinstance(file, Mapping) else Recipe.load(file)
        budget = words.pop("budget", None)
        if words:
            raise OptionError(f"{', '.join(words)}: a recipe file is complete; beside it only budget can be given.")
        return recipe if budget is None else recipe.with_options(budget=Budget.parse(budget))
    return method(str(name), **words)


def refuse(recipe: Recipe) -> None:
    """Refuse a recipe that needs what a server does not have.

    Raises:
        RecipeError: with what it needs.
    """
    reasons = {
        "has no budget, so nothing would be given back": recipe.budget is None,
        "gives layers unequal budgets": recipe.layers.name != "uniform",
        "folds entries, and vLLM's kernels take no logit bias": recipe.merge.biased or recipe.merge.name != "evict",
        "compresses while decoding (every=)": recipe.trigger.every is not None,
        "leaves layers whole (skip=)": bool(recipe.skip),
        "lets layers share a choice (reuse=)": recipe.reuse > 1,
        "re-rotates keys": recipe.rerotate,
        f"needs {recipe.needs}": recipe.needs != Signals(window=recipe.needs.window),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise RecipeError(
            f"recipe {recipe.name} {' and '.join(found)}, which kvthrift does not do inside vLLM. Methods of keys, "
            "values and the last queries, with equal layers, work there: snapkv, adakv, tova, keydiff, knorm."
        )


def _policy(recipe: Recipe, bytes_a_token: int) -> Policy:
    budget, least = recipe.budget, recipe.protect.entries
    assert budget is not None
    if budget.unit == "share":
        return Policy(share=float(budget.amount), least=least)
    entries = int(budget.amount) if budget.unit == "entries" else int(budget.amount) // bytes_a_token
    if entries < max(least, 1):
        raise OptionError(
            f"budget {budget} comes to {entries} entries a head, but {recipe.name} always keeps {least}. Raise it."
        )
    return Policy(entries=entries, least=least)
