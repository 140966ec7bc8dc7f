"""Which models are compressed, which layers are left whole, and who is refused with which sentence."""

from __future__ import annotations

import pytest
import torch
from tests.models import build, config, text, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvthrift
from kvthrift.errors import MissingSignalError, ModelMismatchError, UnsupportedModelError

PROMPT = 100


def answer(model: PreTrainedModel, past: object, count: int = 8) -> Tensor:
    ids = text(2, PROMPT)
    made: Tensor = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=count, do_sample=False
    )
    return made[:, PROMPT:]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("mistral_sliding", "no full-attention layer"),
        ("mamba", "no full-attention layer"),
    ],
)
def test_caches_that_are_not_keys_and_values_are_refused_at_once(name: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        kvthrift.Cache(config(name), "snapkv", budget=48)
    assert "own cache" in str(caught.value)  # the remedy


def test_attention_in_both_directions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="both directions"):
        kvthrift.Cache(config("llama", is_causal=False))


@pytest.mark.parametrize(("name", "why"), [("gpt_oss", "learned sink logits"), ("gemma2", "caps its attention logits")])
def test_attention_that_is_no_plain_softmax_is_refused(name: str, why: str) -> None:
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match=why):
        answer(model, kvthrift.Cache(model.config, "snapkv", budget=48))


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_it_is_refused_without_our_cache_too(name: str) -> None:
    """Otherwise attn_implementation="kvthrift" would answer wrongly in silence."""
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match="does not compute"):
        model(input_ids=text(1, 8))


def test_a_model_with_an_attention_of_its_own_is_found_out() -> None:
    """BLOOM never calls the attention interface, so what it hands over is not attended to through us."""
    model = build(config("bloom"))
    with pytest.raises(UnsupportedModelError, match="type 'bloom' compute attention by code of their own"):
        kvthrift.prefill(model, text(1, 60), "snapkv", budget=48)
    with pytest.raises(UnsupportedModelError, match="layer 0 attended without"):
        answer(model, kvthrift.Cache(model.config, "snapkv", budget=48))


def test_one_of_a_single_layer_is_found_out_by_the_next_pass() -> None:
    alone = config("bloom")
    alone.n_layer = 1
    with pytest.raises(kvthrift.CacheStateError, match="never attended"):
        answer(build(alone), kvthrift.Cache(alone, "snapkv", budget=48))


def test_a_cache_for_a_model_in_place_of_its_config() -> None:
    model = tiny("llama")
    with pytest.raises(kvthrift.OptionError, match=r"is a LlamaForCausalLM, .* Pass model\.config"):
        kvthrift.Cache(model, "snapkv")  # type: ignore[arg-type]


def test_sliding_layers_are_left_whole_and_named() -> None:
    model = tiny("gemma3")
    past = kvthrift.Cache(model.config, "snapkv", budget=40, page=8)
    answer(model, past)
    rows = past.report().layers
    assert [row.note for row in rows] == ["left whole: sliding window of 24, not full attention", ""] * 2
    assert [row.most for row in rows] == [23, 47, 23, 47]
    assert all(row.bytes > 0 for row in rows)


@pytest.mark.parametrize("budget", [PROMPT + 8, 48])
def test_linear_attention_beside_full_attention_is_left_whole(budget: int) -> None:
    model = tiny("qwen3_next")
    past = kvthrift.Cache(model.config, "snapkv", budget=budget)
    made = answer(model, past)
    report = past.report()
    assert "left whole: LinearAttentionLayer" in report.layers[0].note
    assert report.layers[0].bytes > 0
    assert report.layers[1].most == min(budget, PROMPT) + 7
    plain = tiny("qwen3_next", "sdpa")
    if budget > PROMPT:
        assert torch.equal(made, answer(plain, DynamicCache(config=plain.config)))


@pytest.mark.parametrize("name", ["cohere", "opt", "qwen3_next"])
@pytest.mark.parametrize("options", [{"recipe": "expected_attention"}, {"recipe": "streamingllm", "rerotate": True}])
def test_methods_that_turn_keys_need_a_rotary_embedding_we_know(name: str, options: dict[str, object]) -> None:
    model = tiny(name)
    with pytest.raises(MissingSignalError, match=r"has not checked how \w+ rotates"):
        answer(model, kvthrift.Cache(model.config, budget=48, **options))  # type: ignore[arg-type]


def test_a_rotary_embedding_that_changes_with_length_is_no_signal() -> None:
    made = config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    model = build(made)
    with pytest.raises(MissingSignalError, match="'dynamic'"):
        answer(model, kvthrift.Cache(model.config, "expected_attention", budget=48))
    answer(model, kvthrift.Cache(model.config, "snapkv", budget=48))  # which asks for none


def test_a_quantised_output_projection_is_no_signal() -> None:
    model = build(config("llama"))
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
    with pytest.raises(MissingSignalError, match="output projection"):
        answer(model, kvthrift.Cache(model.config, "criticalkv", budget=48))


def test_a_calibration_for_another_model_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ModelMismatchError, match=r"[Cc]alibrat"):
        answer(model, kvthrift.Cache(model.config, "headkv", budget=48))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_that_would_ignore_the_cache_is_refused(attention: str) -> None:
    model = tiny("llama", attention)
    with pytest.raises(UnsupportedModelError, match='attn_implementation="kvthrift"'):
        answer(model, kvthrift.Cache(model.config, "snapkv", budget=48))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_attention_without_our_cache_is_transformers_own(name: str) -> None:
    ours, plain = tiny(name), tiny(name, "sdpa")
    ids = text(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.inference_mode():
        for given in (None, mask):
            left = ours(input_ids=ids, attention_mask=given).logits
            right = plain(input_ids=ids, attention_mask=given).logits
            keep = torch.ones_like(mask).bool() if given is None else given.bool()
            torch.testing.assert_close(left[keep], right[keep], atol=1e-5, rtol=1e-5)
    past, own = DynamicCache(config=ours.config), DynamicCache(config=plain.config)
    assert torch.equal(answer(ours, past), answer(plain, own))


def test_bfloat16_answers_as_the_full_cache_does_until_something_is_dropped() -> None:
    model = build(config("llama")).to(torch.bfloat16)
    past = kvthrift.Cache(model.config, "snapkv", budget=PROMPT + 8)
    assert torch.equal(answer(model, past), answer(model, kvthrift.Cache(model.config)))
    assert past.state.layers[0].store is not None
    assert past.state.layers[0].store.pool.keys.dtype == torch.bfloat16
