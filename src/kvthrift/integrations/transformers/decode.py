"""Greedy decoding, one forward pass a token, each pass timed.

What measures speed uses this instead of ``generate``, so that nothing but the model and its cache is in the loop.
Knows nothing of recipes, texts or terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvthrift.errors import ContextError
from kvthrift.integrations.transformers.cache import Cache


@dataclass(frozen=True)
class Decoded:
    """What was decoded, and how long it took.

    Attributes:
        tokens: ids in order, the end token included if one came.
        prefill_seconds: the pass over the tokens that were not in the cache, up to the first new token.
        step_seconds: every later pass, one token each.
    """

    tokens: tuple[int, ...]
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """Of the median step; None when the first token was the last."""
        return 1 / median(self.step_seconds) if self.step_seconds else None


def greedy(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Cache,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None = None,
) -> Decoded:
    """The likeliest next token, again and again, until an end token or ``max_new_tokens``.

    Args:
        ids: ``[1, Q]`` tokens that are not in the cache yet; at least one.
        cache: filled with what comes before ``ids``, or empty; holds all but the last new token afterwards.
        on_token: called with each new token, outside of what is timed.

    Raises:
        ContextError: ``ids`` is not one sequence of at least one token, or no token is asked for.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.numel() == 0 or max_new_tokens < 1:
        raise ContextError(
            f"ids of shape {tuple(ids.shape)} and max_new_tokens={max_new_tokens} give nothing to decode. Pass "
            "[1, Q] with Q of at least 1, and ask for at least 1 token."
        )
    ends, tokens, seconds = end_tokens(model), list[int](), list[float]()
    with torch.inference_mode():
        while len(tokens) < max_new_tokens:
            began = perf_counter()
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())  # waits for the device
            seconds.append(perf_counter() - began)
            tokens.append(token)
            if on_token is not None:
                on_token(token)
            if token in ends:
                break
            ids = ids.new_tensor([[token]])
    return Decoded(tuple(tokens), seconds[0], tuple(seconds[1:]))


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Ids that end an answer, as the model's generation config says."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if found is None else {found} if isinstance(found, int) else set(found)
