"""Reading a context once, compressed before any question is seen, to be asked many times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.budget import Budget
from kvthrift.errors import ContextError, OptionError
from kvthrift.integrations.transformers.cache import Cache, resolve
from kvthrift.integrations.transformers.second_pass import check_length, finish, start
from kvthrift.recipe import Recipe


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    recipe: str | Recipe = "full",
    *,
    budget: int | str | Budget | None = None,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    page: int = 64,
    observe: Sequence[str | Recipe] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    delimiters: Collection[int] | None = None,
    **options: Any,
) -> Cache:
    """Read a context into a compressed cache.

    The budget is the context's: what is asked and answered afterwards is added to it uncompressed (unless ``every``
    compresses while decoding too). Ask with ``model.generate(ids_of_context_and_question,
    past_key_values=context.fork())``: transformers reads on from where the context ends.

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        input_ids: ``[B, T]``.
        recipe, budget, page, observe, options: as for :class:`Cache`.
        attention_mask: ``[B, T]``, 0 for padding, left or right.
        chunk: read so many tokens at a time (about), compressing after each, so that the peak does not grow with the
            prompt; None reads all at once. Recipes that look twice hold the whole context all the same.
        tokenizer: the model's; recipes that look twice (``kvzip``) then ask for the repetition in words, in the chat
            form that it knows. Without one they repeat without words, unless the recipe brings their ids. Recipes that
            look at the text's segments (``sablock``) find its punctuation with it.
        delimiters: ids of tokens that end a segment, instead of those a tokenizer finds.

    Returns:
        The cache.

    Raises:
        ContextError: there are no tokens, or more than the model's positions (a second pass takes some, too).
        MissingSignalError: the recipe looks at segments, and neither ``tokenizer`` nor ``delimiters`` is given.
        OptionError: ``chunk`` is below 2.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ContextError(
            f"the context has shape {tuple(input_ids.shape)} and no tokens to read. Pass ids [batch, tokens]."
        )
    check_length(model, input_ids.shape[1])
    if chunk is not None and chunk < 2:
        raise OptionError(f"chunk={chunk} must be at least 2 tokens.")
    wanted = resolve(recipe, budget, options)
    cache = start(model.config, wanted, page=page, observe=observe)
    cache.tell(input_ids, tokenizer=tokenizer, delimiters=delimiters, attention_mask=attention_mask)
    total = input_ids.shape[1]
    pieces = 1 if chunk is None else -(-total // chunk)
    stops = [total * (index + 1) // pieces for index in range(pieces)]  # even: a short last one is a poor window
    with torch.no_grad():
        cache.state.prompted = True
        for first, stop in zip([0, *stops], stops, strict=False):
            cache.state.chunked = stop < total
            _read(model, input_ids[:, first:stop], attention_mask, first, stop, cache)
            cache.compact()
        cache.state.prompted = False
        finish(model, cache, input_ids, wanted, attention_mask=attention_mask, tokenizer=tokenizer)
    return cache


def _read(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None, start: int, stop: int, cache: Cache
) -> None:
    extra: dict[str, Tensor] = {}
    if attention_mask is not None:
        mask = attention_mask[:, :stop].to(ids.device)
        extra["attention_mask"] = mask
        extra["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, start:]
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)


__all__ = ["check_length", "prefill"]
