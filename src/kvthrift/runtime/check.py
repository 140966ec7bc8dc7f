"""What a cache refuses before anything has changed: budgets that cannot be met, and signals that nobody gathered."""

from __future__ import annotations

import numpy as np

from kvthrift.core import Signals
from kvthrift.errors import CacheStateError, MissingSignalError, RecipeError
from kvthrift.recipe import Recipe
from kvthrift.runtime.agree import Agreement, check_timing
from kvthrift.runtime.compress import check_floor, check_prompt
from kvthrift.runtime.step import Step
from kvthrift.store import LayerStore


class Checked(Agreement):
    """An agreement, and whether it can be honoured."""

    def _check_room(self, store: LayerStore, step: Step) -> None:
        """Refuse a prompt of which the budget could not hold what is protected, before anything has changed.

        A recipe that looks twice is refused as well: a forward pass looks once.
        """
        if self.needs.second_pass and self.recipe.compresses and not self.sealed:
            raise MissingSignalError(
                f"recipe {self.recipe.name} scores a context by a second pass over it, which a forward pass or "
                "generate() by itself cannot make. Read the context with kvthrift.prefill(model, ids, recipe) and ask "
                "behind it (on the command line: --hide-question)."
            )
        if self.guesses and 0 < self.columns.length < step.length:
            raise CacheStateError(
                f"assisted decoding in model.generate reads all {step.length} tokens from the first on, although this "
                f"cache holds {self.columns.length} of them already, which would then be there twice. Call "
                "kvthrift.generate, which takes the same assistant_model or prompt_lookup_num_tokens."
            )
        if self.is_prompt(step):
            seen = (step.start + step.counts).tolist()
            rooms = [room for n, room in zip(seen, self._room(store, seen), strict=True) if n > room]
            if rooms or self.recipe.layers.decides:
                self._check_segments()
            if rooms:
                check_floor(self.recipe, np.asarray(rooms))
            if self.guesses and (rooms or self.recipe.layers.decides):
                raise CacheStateError(
                    "assisted decoding in model.generate reads its first candidates together with the prompt, so that "
                    "tokens which may be rejected would have a say in what stays. Call kvthrift.generate, which reads "
                    "the prompt alone and takes the same assistant_model or prompt_lookup_num_tokens."
                )
        if self.needs.prompt and self.recipe.compresses and self._lengthens(step):
            prompt = step.start + step.counts
            check_prompt(self.recipe, prompt, np.asarray(self._room(store, prompt.tolist())))

    def _check_segments(self, recipe: Recipe | None = None) -> None:
        """Refuse to compress by segments of a text whose tokens nobody told."""
        recipe = self.recipe if recipe is None else recipe
        if recipe.needs.segments and self.segments is None:
            raise MissingSignalError(
                f"recipe {recipe.name} cuts the text at its punctuation, but a forward pass or generate() by itself "
                "does not tell the cache which tokens it reads. Read the text with kvthrift.prefill(model, ids, "
                "recipe, tokenizer=tokenizer) or kvthrift.generate(model, ids, cache, tokenizer=tokenizer), or call "
                "cache.tell(ids, tokenizer=tokenizer) first."
            )

    def _check_adoption(self, recipe: Recipe) -> None:
        check_timing(recipe)
        if self.recipe.compresses:
            raise RecipeError(
                "entries were dropped already, so another recipe cannot choose among them. Start from 'full'."
            )
        if self.recipe.codec is not None:
            raise RecipeError(
                f"this cache keeps its entries in {self.recipe.codec.name}, so another recipe would begin with rounded "
                "numbers. Read the context without a codec."
            )
        missed = unobserved(recipe.needs, self.observes)
        if missed:
            raise MissingSignalError(
                f"recipe {recipe.name} needs {recipe.needs}, but reading gathered {self.observes}. Name the recipe in "
                "observe= when the context is read."
            )
        if recipe.compresses:
            self._check_segments(recipe)
        for wanted in recipe.needs.second_pass if recipe.compresses else ():
            if recipe.trigger.every is not None:
                raise RecipeError(
                    f"recipe {recipe.name} scores a context by a second pass over it, and there is none over what is "
                    f"decoded behind it, so every={recipe.trigger.every} cannot be honoured. Leave every out."
                )
            found = [layer.second_pass.get(wanted) for layer in self.layers]
            held = [0 if layer.store is None else layer.store.longest for layer in self.layers]
            if any(x is None or x.shape[-1] != n for x, n in zip(found, held, strict=True)):
                raise MissingSignalError(
                    f"recipe {recipe.name} needs a second pass over all that is held, and none was made. Read the "
                    "context with kvthrift.prefill, the recipe given or named in observe=."
                )


def unobserved(needs: Signals, observes: Signals) -> bool:
    """Whether ``observes`` lacks something of ``needs`` (what a module can tell any time is never missed)."""
    moments = needs.moments and not (observes.moments and observes.moments_after == needs.moments_after)
    second = not set(needs.second_pass) <= set(observes.second_pass) or not set(needs.powers) <= set(observes.powers)
    return needs.window > observes.window or moments or second or (needs.columns and not observes.columns)
