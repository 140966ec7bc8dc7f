"""The slow truth about a compressed cache: the whole cache, with everything that was dropped masked out.

``MaskedModel`` is a model of ``tests.models`` on transformers' own cache, whose attention is written out and hides,
layer by layer and head by head, the columns that a kvthrift cache does not hold.
"""

from __future__ import annotations

from typing import Any

import torch
from tests.models import tiny
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvthrift

NAME = "tests_masked"
Kept = dict[int, Tensor]  # layer number -> [B, H, columns] bool

_hidden: Kept = {}
_seen: dict[int, Tensor] = {}


def kept(cache: kvthrift.Cache) -> Kept:
    """Which columns each head of each compressed layer holds, where no column was padding."""
    out: Kept = {}
    for layer in cache.state.layers:
        store = layer.store
        assert store is not None
        valid, positions = store.valid(), store.positions()
        held = torch.zeros(*valid.shape[:2], cache.get_seq_length(), dtype=torch.long)
        held.scatter_add_(2, positions.masked_fill(~valid, 0), valid.long())
        assert held.max() == 1  # no position twice
        out[layer.number] = held.bool()
    return out


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    group, total, length = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    logits = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2)
    logits = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        steps = torch.arange(total)
        attention_mask = steps <= steps[total - length :, None]
    logits = logits.masked_fill(~attention_mask, float("-inf"))
    held = _hidden.get(int(module.layer_idx))  # type: ignore[arg-type]
    if held is not None:
        gone = torch.zeros(*held.shape[:2], total, dtype=torch.bool)
        gone[..., : held.shape[2]] = ~held
        logits = logits.masked_fill(gone.repeat_interleave(group, dim=1)[:, :, None], float("-inf"))
    weights = logits.softmax(dim=-1)
    _seen[int(module.layer_idx)] = weights  # type: ignore[arg-type]
    out = weights @ value.repeat_interleave(group, dim=1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class MaskedModel:
    """A model that reads on with columns hidden; ``seen``: the last pass's attention ``[B, HG, Q, T]`` by layer."""

    def __init__(self, name: str) -> None:
        self.model = tiny(name, NAME)
        self.past = DynamicCache(config=self.model.config)
        self.seen: dict[int, Tensor] = {}

    @torch.inference_mode()
    def read(self, ids: Tensor, held: Kept | None = None) -> Tensor:
        """Logits ``[B, T, vocabulary]`` for ``ids [B, T]``, which see only what is ``held`` of earlier columns."""
        _hidden.update(held or {})
        try:
            logits: Tensor = self.model(input_ids=ids, past_key_values=self.past, use_cache=True).logits
        finally:
            self.seen = dict(_seen)
            _hidden.clear()
            _seen.clear()
        return logits
