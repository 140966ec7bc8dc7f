"""Recorded steps on a GPU: what they say is what eager steps say, whatever the cache holds."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, tiny

import kvthrift
from kvthrift.integrations.transformers.graph import GraphSteps, GraphUnavailableError

pytestmark = pytest.mark.gpu

MODELS = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox"]
METHODS = ["full", "snapkv", "adakv", "lava", "streamingllm"]
WATCHING = ["snapkv", "cake", "lava", "tova", "h2o", "kv_compress", "expected_attention"]  # look at decoded tokens


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny(name).to("cuda", dtype)


@pytest.fixture(autouse=True)
def _models_go_back() -> Any:
    yield
    for name in (*MODELS, "gemma3", "qwen3_moe"):
        tiny(name).to("cpu", torch.float32)


def prompt(batch: int = 1, length: int = 150) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), device="cuda")


def budget(method: str) -> int | None:
    return None if method == "full" else 50


@torch.inference_mode()
def eager(model: Any, cache: kvthrift.Cache, tokens: torch.Tensor) -> torch.Tensor:
    steps = [model(input_ids=t[:, None], past_key_values=cache).logits[:, -1].clone() for t in tokens.T]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_replays_say_what_eager_steps_say(name: str, method: str, batch: int) -> None:
    model = on_gpu(name)
    cache = kvthrift.prefill(model, prompt(batch), method, budget=budget(method), page=16)
    other = cache.fork()
    tokens = torch.randint(1, VOCABULARY, (batch, 40), device="cuda")
    wanted = eager(model, other, tokens)
    del other
    steps = GraphSteps(model, cache, 40)
    found = torch.stack([steps.step(t).clone() for t in tokens.T], dim=1)
    steps.finish()
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    assert cache.get_seq_length() == 190
    cache.check_integrity()
    assert eager(model, cache, tokens[:, :2]).isfinite().all()


@pytest.mark.parametrize("how", [{}, {"every": 48}, {"eos_token_id": list(range(1, 12)), "pad_token_id": 0}])
@pytest.mark.parametrize("method", ["full", "adakv", "streamingllm", *WATCHING])
def test_generate_says_what_transformers_loop_says(
    method: str, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = on_gpu("llama"), prompt(2)
    how = dict(how)
    options = {"every": how.pop("every")} if "every" in how else {}
    if options and method == "full":
        options = {}

    def cache() -> kvthrift.Cache:
        return kvthrift.Cache(model.config, method, budget=budget(method), page=16, **options)

    wanted = model.generate(ids, past_key_values=cache(), max_new_tokens=120, **how)
    with caplog.at_level(logging.WARNING, "kvthrift"):
        found = kvthrift.generate(model, ids, cache(), max_new_tokens=120, **how)
    assert not caplog.records, "steps were not recorded"
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", WATCHING)
def test_replays_gather_what_eager_steps_gather(method: str, batch: int) -> None:
    model = on_gpu("llama")
    cache = kvthrift.prefill(model, prompt(batch), method, budget=50, page=16, every=40)
    other = cache.fork()
    tokens = torch.randint(1, VOCABULARY, (batch, 42), device="cuda")
    wanted = eager(model, other, tokens)
    steps = GraphSteps(model, cache, 40)
    found = [steps.step(t).clone() for t in tokens.T[:40]]
    steps.finish()
    found += list(eager(model, cache, tokens[:, 40:]).unbind(1))  # compressed first
    torch.testing.assert_close(torch.stack(found, dim=1), wanted, atol=5e-4, rtol=5e-4)
    assert cache.state.meter.compressions > 0
    for mine, theirs in zip(cache.state.layers, other.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        assert (mine.store.lengths == theirs.store.lengths).all()
        valid = mine.store.valid()
        assert torch.equal(mine.store.positions()[valid], theirs.store.positions()[valid])
        for plane in mine.store.pool.planes:
            one, twin = (x.store.plane(plane)[valid] for x in (mine, theirs))
            torch.testing.assert_close(one, twin, atol=1e-3, rtol=1e-3)
        if mine.window is not None and theirs.window is not None:
            assert torch.equal(mine.window.positions, theirs.window.positions)
            torch.testing.assert_close(mine.window.queries, theirs.window.queries, atol=1e-3, rtol=1e-3)
    del other, theirs
    cache.check_integrity()


def test_sums_over_pages_in_few_bits_run_eagerly_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from kvthrift.integrations.transformers import generate as module

    module._say_why.cache_clear()
    model, ids = on_gpu("llama", torch.bfloat16), prompt()
    made = kvthrift.generate(
        model, ids, kvthrift.Cache(model.config, "h2o", budget=50, every=8, codec="int8"), max_new_tokens=20
    )
    assert made.shape[1] == 170
    assert "few bits" in caplog.text


def test_left_padding_and_bf16() -> None:
    model, ids = on_gpu("llama", torch.bfloat16), prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    caches = [kvthrift.prefill(model, ids[:, :-1], "adakv", budget=50, attention_mask=mask[:, :-1]) for _ in range(2)]
    tokens = ids[:, -1:].repeat(1, 5)
    steps = GraphSteps(model, caches[0], 5)
    found = torch.stack([steps.step(t).clone() for t in tokens.T], dim=1)
    steps.finish()
    wanted = []
    with torch.inference_mode():
        for step, token in enumerate(tokens.T):
            whole = torch.cat((mask[:, :-1], mask.new_ones(2, step + 1)), dim=1)
            place = whole.sum(dim=1, keepdim=True) - 1
            out = model(input_ids=token[:, None], attention_mask=whole, position_ids=place, past_key_values=caches[1])
            wanted.append(out.logits[:, -1])
    torch.testing.assert_close(found, torch.stack(wanted, dim=1), atol=0.1, rtol=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_fused_parts() -> None:
    model = on_gpu("llama", torch.bfloat16)
    cache = kvthrift.prefill(model, prompt(2), "adakv", budget=50)
    other = cache.fork()
    tokens = torch.randint(1, VOCABULARY, (2, 6), device="cuda")
    steps = GraphSteps(model, cache, 6, compiled=True)
    found = torch.stack([steps.step(t).clone() for t in tokens.T], dim=1)
    steps.finish()
    torch.testing.assert_close(found, eager(model, other, tokens), atol=0.1, rtol=0.1)


def test_what_cannot_be_recorded_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from kvthrift.integrations.transformers import generate as module

    for name, word in (("gemma3", "transformers' own cache"),):
        module._say_why.cache_clear()
        model, ids = on_gpu(name), prompt()
        wanted = model.generate(
            ids, past_key_values=kvthrift.Cache(model.config, "snapkv", budget=50), max_new_tokens=8
        )
        found = kvthrift.generate(model, ids, kvthrift.Cache(model.config, "snapkv", budget=50), max_new_tokens=8)
        assert torch.equal(found, wanted)
        assert word in caplog.text


def test_a_failed_recording_leaves_the_cache_usable() -> None:
    model = on_gpu("llama")
    cache = kvthrift.prefill(model, prompt(), "adakv", budget=50)
    other = cache.fork()
    handle = model.model.layers[1].register_forward_hook(
        lambda *_: torch.ones(1, device="cuda").item()
    )  # asks the host
    with pytest.raises(GraphUnavailableError):
        GraphSteps(model, cache, 10)
    handle.remove()
    tokens = torch.randint(1, VOCABULARY, (1, 5), device="cuda")
    torch.testing.assert_close(eager(model, cache, tokens), eager(model, other, tokens), atol=2e-4, rtol=2e-4)


def test_no_step_beyond_the_room() -> None:
    model = on_gpu("llama")
    steps = GraphSteps(model, kvthrift.prefill(model, prompt(), "adakv", budget=50), 2)
    for _ in range(2):
        steps.step(torch.ones(1, dtype=torch.long, device="cuda"))
    with pytest.raises(IndexError):
        steps.step(torch.ones(1, dtype=torch.long, device="cuda"))
