"""Prompts on CUDA: the host goes on while the device compresses; torch itself tells when it waits."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvthrift

pytestmark = pytest.mark.gpu

LAYERS, PROMPT, BUDGET = 3, 900, 128


@cache
def model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="kvthrift", dtype=torch.bfloat16)
    return made.eval().to("cuda")  # type: ignore[no-any-return]


def prompt(batch: int) -> Tensor:
    return torch.randint(512, (batch, PROMPT), device="cuda")


def waits(name: str, batch: int = 2, chunk: int | None = None) -> tuple[list[str], kvthrift.Cache]:
    """What torch says it waited for in a prompt, behind one in which kernels are compiled."""
    size, ids = None if name == "full" else BUDGET, prompt(batch)
    torch.use_deterministic_algorithms(False)  # as in practice
    kvthrift.prefill(model(), ids, name, budget=size, chunk=chunk)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            cache = kvthrift.prefill(model(), ids, name, budget=size, chunk=chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    asked = [f"{w.filename}:{w.lineno}" for w in found if "called a synchronizing" in str(w.message)]
    return asked, cache


@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize("name", ["full", "snapkv", "expected_attention", "h2o", "streamingllm", "criticalkv"])
def test_nothing_is_waited_for_where_the_host_can_know_what_stays(name: str, chunk: int | None) -> None:
    asked, cache = waits(name, chunk=chunk)
    assert asked == []
    cache.check_integrity()


def test_heads_that_compete_are_waited_for_once_a_pass() -> None:
    asked, cache = waits("adakv")
    assert len(asked) <= 1, asked
    cache.check_integrity()
    assert cache.report().entries == LAYERS * 2 * 2 * BUDGET


def test_the_instrument_sees_waits() -> None:
    assert waits("chunkkv")[0]
