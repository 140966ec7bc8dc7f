"""Reading a text into a cache, and saying which positions it holds."""

from __future__ import annotations

import torch
from tests.models import build, config
from torch import Tensor
from transformers import PreTrainedModel

from kvthrift import Cache, Recipe, prefill

Held = list[list[list[int]]]
DECIDES = ("dbudgetkv",)  # methods that find their own budget: one that is given is only the most they keep
TWICE = ("kvcompose", "kvzip")  # methods that look at a context twice, which a forward pass by itself cannot


def deep(layers: int, **changes: int) -> PreTrainedModel:
    """A tiny llama of that many layers."""
    return build(config("llama", num_hidden_layers=layers, **changes))


def read(model: PreTrainedModel, ids: Tensor, recipe: Recipe) -> Cache:
    """A cache that the model has read ``ids [B, T]`` into, in one pass; in two, where the recipe looks twice."""
    if recipe.compresses and recipe.needs.second_pass:
        return prefill(model, ids, recipe)
    cache = Cache(model.config, recipe)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def held(cache: Cache) -> Held:
    """Positions that the first sequence holds: layer by layer, head by head."""
    out: Held = []
    for layer in cache.state.layers:
        assert layer.store is not None
        positions, lengths = layer.store.positions()[0], layer.store.lengths[0]
        out.append([positions[h, : lengths[h]].tolist() for h in range(len(lengths))])
    return out
