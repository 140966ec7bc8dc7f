"""The real model in bf16: a budget that covers everything changes no token, and a small one really frees memory."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from tests.reading import TWICE
from torch import Tensor
from transformers import DynamicCache

import kvthrift
from kvthrift.data import demo_text
from kvthrift.integrations.transformers.embedded import is_available
from kvthrift.integrations.transformers.loading import load_model

pytestmark = pytest.mark.skipif(not is_available(), reason="the embedded model's package is not installed")

PROMPTS = (
    "Write three sentences about the sea.",
    "What is the capital of France, and what is it known for?",
    "List five animals that live in the desert.",
    "Explain to a child why the sky is blue.",
    "Continue the story: The old lighthouse keeper heard a knock at the door, although no boat had come for weeks.",
)
STEPS = 64


@cache
def loaded() -> tuple[Any, Any]:
    return load_model(None, dtype=torch.bfloat16, device="cpu")


@cache
def prompt(index: int) -> Tensor:
    _, tokenizer = loaded()
    message = [{"role": "user", "content": PROMPTS[index]}]
    ids: Tensor = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt").input_ids
    return ids


def go(cache_: Any, index: int, attention: str) -> list[int]:
    model, _ = loaded()
    model.set_attn_implementation(attention)
    try:
        out = model.generate(
            prompt(index),
            attention_mask=torch.ones_like(prompt(index)),
            past_key_values=cache_,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
        )
    finally:
        model.set_attn_implementation("kvthrift")
    tokens: list[int] = out[0, prompt(index).shape[1] :].tolist()
    return tokens


@cache
def reference(index: int) -> list[int]:
    return go(DynamicCache(config=loaded()[0].config), index, "sdpa")


@pytest.mark.parametrize("name", [name for name in kvthrift.methods() if name not in TWICE])
def test_a_budget_that_covers_everything_changes_no_token(name: str) -> None:
    model, _ = loaded()
    for index in range(len(PROMPTS)):
        own = {} if name == "full" else {"budget": 512}
        assert go(kvthrift.Cache(model.config, name, **own), index, "kvthrift") == reference(index)


@pytest.mark.parametrize(
    ("name", "options"), [("snapkv", {}), ("adakv", {}), ("pyramidkv", {}), ("adakv", {"base": "h2o"})]
)
def test_bytes_held_at_512_entries(name: str, options: dict[str, Any]) -> None:
    model, tokenizer = loaded()
    ids = tokenizer(demo_text()[:9000], return_tensors="pt").input_ids
    context = kvthrift.prefill(model, ids, name, budget=512, **options)
    report = context.report()
    store = context.state.layers[0].store
    assert store is not None
    entry = 2 * 64 * 2  # key and value of 64 numbers in bf16
    pages = sum(int((-(-layer.store.lengths // 64)).sum()) for layer in context.state.layers if layer.store)
    rounding = (pages * 64 - report.entries) * entry
    assert report.entries == 512 * 3 * 30
    assert report.bytes <= 1.05 * (report.entries * entry + rounding)
    gc.collect()
    reachable: dict[int, int] = {}
    for layer in context.state.layers:
        if layer.store is None:
            continue
        for tensor in (*layer.store.pool.tensors(), layer.store._index):
            reachable[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(reachable.values()) == report.bytes  # what torch holds is what is reported
