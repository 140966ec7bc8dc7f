"""Attending to a compressed cache is attending to the whole one with the rest masked out, in every kind of pass."""

from __future__ import annotations

import pytest
import torch
from tests.masked import MaskedModel, kept
from tests.models import text, tiny
from torch import Tensor

import kvthrift
from kvthrift.allocate import AdaptiveHeads

MODELS = ("llama", "qwen3", "mistral", "phi3", "gpt_neox", "gemma3", "qwen3_moe")
BATCH = 2


@torch.inference_mode()
def read(name: str, past: kvthrift.Cache, ids: Tensor) -> Tensor:
    logits: Tensor = tiny(name)(input_ids=ids, past_key_values=past, use_cache=True).logits
    return logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)


RECIPES = {
    "even": kvthrift.method("snapkv", budget=24, window=8),
    "ragged heads": kvthrift.method("snapkv", budget=24, window=8).with_options(heads=AdaptiveHeads(0.0)),
    "ragged layers and heads": kvthrift.method("lava", budget=24, window=8),
}


@pytest.mark.parametrize("shape", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_reading_on_sees_what_was_kept(name: str, shape: str) -> None:
    past = kvthrift.Cache(tiny(name).config, RECIPES[shape], page=16)
    truth = MaskedModel(name)
    passes = [text(BATCH, length, seed=length) for length in (90, 5, 1, 1, 40, 1, 7)]  # 90 and 40 compress
    close(read(name, past, passes[0]), truth.read(passes[0]))
    rows = [row for row in past.report().layers if not row.note]
    assert any(row.fewest < row.most for row in rows) == (shape != "even" and rows[0].heads > 1)
    for ids in passes[1:]:
        held = kept(past)
        assert not all(mask.all() for mask in held.values())
        close(read(name, past, ids), truth.read(ids, held))


def test_folded_entries_pull_on_the_output() -> None:
    """Folding is not eviction: the same entries stay, and the answers differ."""
    ids, more = text(BATCH, 90), text(BATCH, 4)
    logits = {}
    for merge in ("evict", "fold"):
        past = kvthrift.Cache(tiny("llama").config, "snapkv", budget=24, window=8, merge=merge)
        read("llama", past, ids)
        logits[merge] = read("llama", past, more)
        assert logits[merge].isfinite().all()
    truth = MaskedModel("llama")
    truth.read(ids)
    whole = truth.read(more)
    assert not torch.allclose(logits["fold"], logits["evict"], atol=1e-3)
    assert not torch.allclose(logits["fold"], whole, atol=1e-3)
