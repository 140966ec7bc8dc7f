"""Letting a model read on behind what its cache holds."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from kvthrift.errors import ContextError
from kvthrift.integrations.transformers.cache import Cache


def read_on(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, cache: Cache, *, keep: int = 1) -> Tensor:
    """Let the model read what the cache does not hold.

    Args:
        input_ids: ``[B, T]``, what the cache holds already included.
        mask: ``[B, T]``, 0 for padding, or None.
        keep: newest columns whose logits are wanted.

    Returns:
        Logits ``[B, keep, vocabulary]``.

    Raises:
        ContextError: the cache holds all of it.
    """
    past = cache.get_seq_length()
    if past >= input_ids.shape[1]:
        raise ContextError(
            f"the cache holds {past} tokens, and input_ids has {input_ids.shape[1]}: nothing is left to read. Pass the "
            "ids of what the cache holds and of what comes behind it."
        )
    extra: dict[str, Tensor] = {}
    if mask is not None:
        extra["attention_mask"] = mask
        extra["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
    out = model(input_ids=input_ids[:, past:], past_key_values=cache, use_cache=True, logits_to_keep=keep, **extra)
    logits: Tensor = out.logits[:, -keep:]
    return logits
