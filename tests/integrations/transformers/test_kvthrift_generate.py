"""``kvthrift.generate`` says what ``model.generate`` says, in every mode it offers; on a CPU its steps run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, tiny
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

import kvthrift
from kvthrift.errors import ContextError, OptionError

LENGTH = 80


def ids(batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def cache_of(model: PreTrainedModel, method: str = "snapkv", **options: Any) -> kvthrift.Cache:
    return kvthrift.Cache(model.config, method, budget=None if method == "full" else 40, **options)


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(1, 30)), "pad_token_id": 0},
    ],
)
def test_the_same_tokens_as_transformers_loop(method: str, how: dict[str, Any]) -> None:
    model, prompt = tiny("llama"), ids(3)
    torch.manual_seed(1)
    wanted = model.generate(prompt, past_key_values=cache_of(model, method), max_new_tokens=12, **how)
    torch.manual_seed(1)
    assert torch.equal(kvthrift.generate(model, prompt, cache_of(model, method), max_new_tokens=12, **how), wanted)


def test_padding_to_the_left() -> None:
    model, prompt = tiny("llama"), ids(2)
    mask = torch.ones_like(prompt)
    mask[0, :30] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8}
    wanted = model.generate(prompt, past_key_values=cache_of(model), **given)
    assert torch.equal(kvthrift.generate(model, prompt, cache_of(model), **given), wanted)


def test_a_context_read_before() -> None:
    model, prompt = tiny("llama"), ids()
    context = kvthrift.prefill(model, prompt[:, :60], "adakv", budget=40)
    wanted = model.generate(prompt, past_key_values=context.fork(), max_new_tokens=9)
    assert torch.equal(kvthrift.generate(model, prompt, context.fork(), max_new_tokens=9), wanted)
    assert context.get_seq_length() == 60


def test_compression_while_decoding_and_layers_left_whole() -> None:
    for name, options in (("llama", {"every": 8}), ("gemma3", {})):
        model, prompt = tiny(name), ids()
        wanted = model.generate(prompt, past_key_values=cache_of(model, **options), max_new_tokens=20)
        assert torch.equal(kvthrift.generate(model, prompt, cache_of(model, **options), max_new_tokens=20), wanted)


def test_a_generation_config_outputs_and_criteria() -> None:
    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= LENGTH + 3)

    model, prompt = tiny("llama"), ids()
    how = {
        "generation_config": GenerationConfig(max_new_tokens=9, return_dict_in_generate=True, output_scores=True),
        "stopping_criteria": [Third()],
    }
    wanted = model.generate(prompt, past_key_values=cache_of(model), **how)
    cache = cache_of(model)
    found = kvthrift.generate(model, prompt, cache, **how)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.sequences.shape[1] == LENGTH + 3
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores))
    assert found.past_key_values is cache


def test_a_streamer_gets_every_token_once() -> None:
    class Keep:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    model, prompt, keep = tiny("llama"), ids(), Keep()
    out = kvthrift.generate(model, prompt, cache_of(model), max_new_tokens=6, streamer=keep)
    assert keep.tokens == out[0].tolist()
    assert keep.ended


def test_why_steps_are_eager_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from kvthrift.integrations.transformers import generate as module

    module._say_why.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("models of the other tests are on the CPU either way")
    for _ in range(2):
        kvthrift.generate(tiny("llama"), ids(), cache_of(tiny("llama")), max_new_tokens=6)
    said = [record.message for record in caplog.records if record.name == "kvthrift"]
    assert len(said) == 1
    assert "cpu" in said[0]


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2}, {"assistant_model": object()}])
def test_modes_with_another_loop_are_refused(how: dict[str, Any]) -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match=r"model\.generate"):
        kvthrift.generate(model, ids(), cache_of(model), max_new_tokens=2, **how)


def test_beams_in_the_generation_config_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match="beams"):
        kvthrift.generate(
            model, ids(), cache_of(model), generation_config=GenerationConfig(num_beams=2, max_new_tokens=2)
        )


def test_nothing_to_read_and_no_cache_are_refused() -> None:
    model, prompt = tiny("llama"), ids()
    with pytest.raises(ContextError, match="nothing is left"):
        kvthrift.generate(model, prompt, kvthrift.prefill(model, prompt, "snapkv", budget=40), max_new_tokens=3)
    with pytest.raises(OptionError, match="takes a kvthrift"):
        kvthrift.generate(model, prompt, None, max_new_tokens=3)  # type: ignore[arg-type]
