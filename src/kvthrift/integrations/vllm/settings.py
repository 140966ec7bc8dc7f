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
from kvthrift.integrations.vllm.layers import answers_beforehand, policies
from kvthrift.integrations.vllm.plan import Policy, plan
from kvthrift.methods import method
from kvthrift.recipe import Recipe

KEY = "kvthrift"
STEP_TOKENS = 2048  # where an engine does not say how many it reads in a step


@dataclass(frozen=True)
class Settings:
    """A recipe as a server follows it.

    Attributes:
        recipe: what to keep.
        policy: how much, in blocks, on average over the layers.
        policies: how much each layer keeps.
        check: whether scheduler and worker counts are compared at every step.
    """

    recipe: Recipe
    policy: Policy
    policies: tuple[Policy, ...]
    check: bool = False

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.policies)

    @property
    def classes(self) -> tuple[Policy, ...]:
        """The different policies, each once: a server keeps a block table for each."""
        return tuple(dict.fromkeys(self.policies))

    @property
    def follows(self) -> bool:
        """Whether a request may be compressed more than once."""
        return self.policy.every is not None or self.policy.chunk is not None

    def idle(self, length: int, block: int) -> bool:
        """Whether no request of at most ``length`` tokens, prompt and answer, gives back a block of so many."""
        return not any(plan(prompt, length, block, one).dropped for one in self.classes for prompt in (1, length))

    def __str__(self) -> str:
        policy = self.policy
        kept = f"{policy.entries} entries" if policy.entries is not None else f"{policy.share:.0%} of the prompt"
        when = [
            "at the end of a prompt" if policy.at_end else "",
            "after every step that reads a part of it" if policy.chunk else "",
            f"every {policy.every} decoded tokens" if policy.every else "",
        ]
        classes = f", {len(self.classes)} classes of layers" if len(self.classes) > 1 else ""
        return f"{self.recipe.name}, {kept} a head{classes}, in whole blocks, {' and '.join(w for w in when if w)}"


def read_settings(
    config: Mapping[str, Any], *, layers: int, kv_heads: int, entry_bytes: int, step_tokens: int = STEP_TOKENS
) -> Settings | None:
    """Settings from an engine's additional config; None where kvthrift was not asked for.

    Args:
        config: the whole additional config; ``config["kvthrift"]`` has ``method`` (with ``budget`` and the method's
            options) or ``recipe`` (a file, or what is in one), and may have ``chunks`` (compress after every step that
            reads a part of a prompt, too), ``groups`` (of unequal layers) and ``check``.
        layers, kv_heads, entry_bytes: of the model, for budgets in bytes (of one request).
        step_tokens: the most tokens that one step reads.

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
    check, chunks, groups = words.pop("check", False), words.pop("chunks", False), words.pop("groups", None)
    for name, flag in (("check", check), ("chunks", chunks)):
        if not isinstance(flag, bool):
            raise OptionError(f"{name}= is true or false.")
    if groups is not None and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
        raise OptionError(f"groups={groups!r} is a number of runs of neighbouring layers, 1 or more.")
    recipe = _recipe(words)
    refuse(recipe, chunks=chunks)
    policy = _policy(recipe, layers * kv_heads * entry_bytes, step_tokens if chunks else None)
    return Settings(recipe, policy, policies(recipe, policy, layers, groups), check)


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


def refuse(recipe: Recipe, *, chunks: bool = False) -> None:
    """Refuse a recipe that needs what a server does not have.

    Args:
        recipe: what was asked for.
        chunks: whether prompts are compressed while they are read, too.

    Raises:
        RecipeError: with what it needs.
    """
    trigger = recipe.trigger
    reasons = {
        "has no budget, so nothing would be given back": recipe.budget is None,
        "keeps the whole prompt, so nothing would be given back": recipe.budget is not None
        and recipe.budget.unit == "share"
        and recipe.budget.amount >= 1
        and trigger.every is None,
        "gives layers budgets that depend on the text, which the scheduler never sees": recipe.layers.name != "uniform"
        and not answers_beforehand(recipe.layers),
        "folds entries, and vLLM's kernels take no logit bias": recipe.merge.biased or recipe.merge.name != "evict",
        "never compresses (prompt=false without every=)": not trigger.prompt and trigger.every is None,
        "leaves prompts whole (prompt=false), which chunks would not": not trigger.prompt and chunks,
        "counts decoded tokens of all requests together (trigger)": trigger.together,
        "keeps the same tokens in all heads (unit), which holds for one compression only": recipe.unit.shared
        and (chunks or trigger.every is not None),
        "shares room over the heads of all layers, which each give back as many blocks": recipe.heads.modelwide,
        "leaves layers whole (skip=)": bool(recipe.skip),
        "lets layers share a choice (reuse=)": recipe.reuse > 1,
        "re-rotates keys": recipe.rerotate,
        "writes numbers in fewer bits (codec=)": recipe.codec is not None,
        f"needs {recipe.needs}": recipe.needs != Signals(window=recipe.needs.window),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise RecipeError(
            f"recipe {recipe.name} {' and '.join(found)}, which kvthrift does not do inside vLLM. Methods of keys, "
            "values and the last queries work there: snapkv, adakv, tova, keydiff, knorm, and with unequal layers "
            "pyramidkv and evolkv."
        )


def _policy(recipe: Recipe, bytes_a_token: int, chunk: int | None) -> Policy:
    budget, least, trigger = recipe.budget, recipe.protect.entries, recipe.trigger
    assert budget is not None
    when: dict[str, Any] = {"at_end": trigger.prompt, "every": trigger.every, "chunk": chunk}
    if budget.unit == "share":
        return Policy(share=float(budget.amount), least=least, **when)
    entries = int(budget.amount) if budget.unit == "entries" else int(budget.amount) // bytes_a_token
    if entries < max(least, 1):
        raise OptionError(
            f"budget {budget} comes to {entries} entries a head, but {recipe.name} always keeps {least}. Raise it."
        )
    return Policy(entries=entries, least=least, **when)
