"""Recipes whose calibrations are made up for another model, and what recipes have to be told of a text."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from kvthrift import Recipe, Trigger
from kvthrift.allocate import BudgetLayers, GroupHeads, TableHeads, TableLayers, WholeHeads
from kvthrift.score import ChosenHeads, LinearSurrogate, QueryCentres
from kvthrift.score.surrogate import EXTRA, pack

# methods that need a calibration of the very model
CALIBRATED = ("headkv", "compresskv", "evolkv", "uncomp", "kvzap", "triattention")
TOLD = ("sablock",)  # methods that have to be told the text's tokens
APART = (*CALIBRATED, *TOLD)
DELIMITERS = tuple(range(0, 199, 9))  # of the tiny models' 199 tokens


def query_centres(layers: int, heads: int, dim: int, *, half: int | None = None, **options: bool) -> QueryCentres:
    """Made-up mean queries whose pairs are longer than they point one way."""
    draw, half = torch.Generator().manual_seed(0), dim // 2 if half is None else half
    mean = torch.randn(layers, heads, dim, generator=draw)
    lengths = torch.hypot(mean[..., :half], mean[..., half : 2 * half])
    lengths += torch.rand(layers, heads, half, generator=draw)
    return QueryCentres(pack(torch.cat((mean, lengths), dim=-1)), layers, heads, **options)


def fitted(
    recipe: Recipe, *, layers: int = 2, kv_heads: int = 2, group: int = 2, dim: int = 16, half: int | None = None
) -> Recipe:
    """The recipe with tables of its own kind for a model of these sizes; one without tables stays as it is.

    A prompt that is pinned is scored instead, for budgets here are below their prompts; ``half`` pairs of dims are
    rotated, all by default.
    """
    scorer, over, heads = recipe.scorer, recipe.layers, recipe.heads
    if isinstance(scorer, ChosenHeads):
        row = tuple(range(kv_heads * group))
        scorer = replace(scorer, ranked=(row[::-1], row) * (layers // 2) + (row,) * (layers % 2), model="")
    if isinstance(scorer, LinearSurrogate):
        weights = torch.randn(layers, kv_heads, 2 * dim + EXTRA, generator=torch.Generator().manual_seed(0))
        scorer = LinearSurrogate(pack(weights), layers, kv_heads)
    if isinstance(scorer, QueryCentres):
        scorer = query_centres(layers, kv_heads * group, dim, half=half, pinned=False)
        recipe = recipe.with_options(trigger=Trigger(every=recipe.trigger.every))
    if isinstance(over, TableLayers):
        over = replace(over, weights=tuple(float(1 + n) for n in range(layers)), model="")
    if isinstance(over, BudgetLayers):
        over = BudgetLayers(tuple(40 + 16 * (n % 2) for n in range(layers)))
    if isinstance(heads, GroupHeads):
        row = tuple(head % len(heads.sizes) for head in range(kv_heads))
        heads = replace(heads, labels=(row, row[::-1]) * (layers // 2) + (row,) * (layers % 2), model="")
    if isinstance(heads, TableHeads):
        row_ = tuple(float(1 + 3 * head) for head in range(kv_heads))
        heads = TableHeads((row_,) * layers, heads.beta, heads.protected)
    if isinstance(heads, WholeHeads):
        rows = tuple(tuple(float((3 * n + head) % 5) for head in range(kv_heads)) for n in range(layers))
        heads = replace(heads, importance=rows, model="")
    return recipe.with_options(scorer=scorer, layers=over, heads=heads)


def fitted_to(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """The same for a model's config."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    layers, dim = int(config.num_hidden_layers), int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    share = dict(getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    half = int(dim * (share or 1.0)) // 2
    return fitted(recipe, layers=layers, kv_heads=kv_heads, group=heads // kv_heads, dim=dim, half=half)
