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


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2}, {"custom_generate": print}])
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


HELP: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": tiny("llama", "sdpa", seed=3)},
    "itself": {"assistant_model": tiny("llama", "sdpa")},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("helper", HELP)
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "h2o", "expected_attention"])
def test_guesses_change_no_token(method: str, helper: str, hidden: bool) -> None:
    """Often wrong or always right, they leave the answer, the cache and what a criterion sees as they are."""
    model, prompt = tiny("llama"), ids(1, 12).repeat(1, 7)
    cache = cache_of(model, method)
    if hidden:
        cache = kvthrift.prefill(model, prompt[:, :-4], method, budget=None if method == "full" else 40)
    twin = cache.fork() if hidden else cache_of(model, method)
    how = {"max_new_tokens": 25, "repetition_penalty": 1.2}
    found = kvthrift.generate(model, prompt, cache, **HELP[helper], **how)
    assert torch.equal(found, kvthrift.generate(model, prompt, twin, **how))
    assert cache.get_seq_length() == twin.get_seq_length() == found.shape[1] - 1
    for mine, theirs in zip(cache.state.layers, twin.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        valid = mine.store.valid()
        assert torch.equal(valid, theirs.store.valid())
        assert torch.equal(mine.store.positions()[valid], theirs.store.positions()[valid])


def test_guesses_with_sliding_layers() -> None:
    model, prompt = tiny("gemma3"), ids(1, 12).repeat(1, 7)
    caches = [cache_of(model) for _ in range(2)]
    how = {"max_new_tokens": 20}
    found = kvthrift.generate(model, prompt, caches[0], **HELP["prompt lookup"], **how)
    assert torch.equal(found, kvthrift.generate(model, prompt, caches[1], **how))
    more = torch.cat((found, ids(1, 5)), dim=1)
    again = [kvthrift.generate(model, more, cache, max_new_tokens=6) for cache in caches]
    assert torch.equal(*again)
    sizes = [sum(row.bytes for row in cache.report().layers) for cache in caches]
    assert sizes[0] == sizes[1]


def test_guesses_with_recurrent_layers_are_refused() -> None:
    model = tiny("qwen3_next")
    with pytest.raises(OptionError, match="layers that cannot go back"):
        kvthrift.generate(model, ids(), cache_of(model), max_new_tokens=4, **HELP["prompt lookup"])


def test_right_guesses_save_passes() -> None:
    model, prompt, passes = tiny("llama"), ids(), [0, 0]
    for number, how in enumerate(({}, HELP["itself"])):
        counted = model.register_forward_hook(lambda *_, n=number: passes.__setitem__(n, passes[n] + 1))
        kvthrift.generate(model, prompt, cache_of(model, "full"), max_new_tokens=24, **how)
        counted.remove()
    assert passes[0] == 24
    assert passes[1] < 16  # all guesses are right, but an unsure helper stops guessing


@pytest.mark.parametrize("helper", HELP)
@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova"])
def test_guesses_and_compression_while_decoding(method: str, helper: str) -> None:
    model, prompt = tiny("llama"), ids(1, 12).repeat(1, 7)
    cache = cache_of(model, method, every=6, page=16)
    found = kvthrift.generate(model, prompt, cache, max_new_tokens=30, **HELP[helper])
    assert found.shape[1] == 84 + 30
    assert all(row.most <= 40 + 6 + 16 for row in cache.report().layers)
    cache.check_integrity()


def test_an_end_among_guesses_ends_the_answer() -> None:
    model, prompt = tiny("llama"), ids()
    plain = kvthrift.generate(model, prompt, cache_of(model, "full"), max_new_tokens=12)
    end = int(plain[0, LENGTH + 6])
    how = {"max_new_tokens": 12, "eos_token_id": end, "assistant_model": tiny("llama", "sdpa")}
    cache = cache_of(model, "full")
    found = kvthrift.generate(model, prompt, cache, **how)
    stop = plain[0, LENGTH:].tolist().index(end)
    assert torch.equal(found, plain[:, : LENGTH + stop + 1])
    assert cache.get_seq_length() == LENGTH + stop


def test_lookup_in_the_generation_config_streams() -> None:
    class Keep:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, prompt, keep = tiny("llama"), ids(1, 12).repeat(1, 7), Keep()
    config = GenerationConfig(max_new_tokens=9, prompt_lookup_num_tokens=3, pad_token_id=0)
    found = kvthrift.generate(model, prompt, cache_of(model), generation_config=config, streamer=keep)
    assert keep.tokens == [*found[0].tolist(), -1]


@pytest.mark.parametrize(("batch", "how"), [(2, {}), (1, {"do_sample": True}), (1, {"return_dict_in_generate": True})])
def test_what_guesses_cannot_be_had_with_is_refused(batch: int, how: dict[str, Any]) -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match="one sequence, decoded greedily"):
        kvthrift.generate(model, ids(batch), cache_of(model), max_new_tokens=4, prompt_lookup_num_tokens=3, **how)
