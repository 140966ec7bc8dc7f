"""Every way transformers generates, with the cache in it: the same answers while all fits, consistent ones when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import build, config, text, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import kvthrift
from kvthrift.errors import CacheStateError

PROMPT, ANSWER = 80, 24
ROOMY, TIGHT = PROMPT + ANSWER, 40


def generate(model: PreTrainedModel, past: object, ids: Tensor | None = None, **options: Any) -> Any:
    ids = text(1, PROMPT) if ids is None else ids
    settings = {"max_new_tokens": ANSWER, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(5)  # of sampling
    return model.generate(ids, past_key_values=past, **settings | options)  # type: ignore[operator]


def cache(name: str, budget: int = ROOMY, **options: Any) -> kvthrift.Cache:
    return kvthrift.Cache(tiny(name).config, "snapkv", budget=budget, page=16, **options)


def plain(name: str) -> tuple[PreTrainedModel, DynamicCache]:
    model = tiny(name, "sdpa")
    return model, DynamicCache(config=model.config)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 1.3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_mode_says_the_same_while_everything_fits(name: str, mode: str) -> None:
    past = cache(name)
    made = generate(tiny(name), past, **MODES[mode])
    assert torch.equal(made, generate(*plain(name), **MODES[mode]))
    past.check_integrity()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "prompt lookup"])
def test_batches_too(mode: str) -> None:
    ids = text(3, PROMPT)
    made = generate(tiny("llama"), cache("llama"), ids, **MODES[mode])
    assert torch.equal(made, generate(*plain("llama"), ids, **MODES[mode]))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_assistant_changes_nothing(name: str) -> None:
    """One that is often wrong makes the cache go back."""
    assistant = tiny(name, "sdpa", seed=3)
    past = cache(name)
    assert torch.equal(generate(tiny(name), past, assistant_model=assistant), generate(*plain(name)))
    past.check_integrity()


HELP: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": tiny("llama", "sdpa", seed=3)},
    "prompt lookup": MODES["prompt lookup"],
}


@pytest.mark.parametrize("helper", HELP)
def test_candidates_have_no_say_in_what_of_the_prompt_stays(helper: str) -> None:
    """Transformers' loop reads the first of them with the prompt; ``kvthrift.generate`` does not."""
    past, ids = cache("llama", TIGHT), text(1, PROMPT)
    with pytest.raises(CacheStateError, match=r"(?s)be rejected would have a say.*kvthrift\.generate"):
        generate(tiny("llama"), past, ids, **HELP[helper])
    assert past.get_seq_length() == 0
    past.reset()
    assert generate(tiny("llama"), past, ids).shape == (1, PROMPT + ANSWER)  # without one, nothing is in the way


@pytest.mark.parametrize("method", ["full", "snapkv"])
@pytest.mark.parametrize("helper", HELP)
def test_what_is_held_already_is_not_read_again(method: str, helper: str) -> None:
    """Transformers' assisted loop feeds all ids in its first pass, whatever a cache holds."""
    ids, model = text(1, PROMPT), tiny("llama")
    past = kvthrift.prefill(model, ids[:, :-5], method, budget=None if method == "full" else TIGHT)
    with pytest.raises(CacheStateError, match=r"there twice.*kvthrift\.generate"):
        generate(model, past, ids, **HELP[helper])
    assert past.get_seq_length() == PROMPT - 5
    past.crop(0)
    assert generate(model, past, ids).shape == (1, PROMPT + ANSWER)


@pytest.mark.parametrize("method", ["snapkv", "lava"])
def test_beams_score_what_their_tokens_score_alone(method: str) -> None:
    """Reordering the compressed cache keeps every beam's own past."""
    model = tiny("llama")
    options = {"budget": TIGHT, "page": 8}
    past = kvthrift.Cache(model.config, method, **options)  # type: ignore[arg-type]
    out = generate(
        model,
        past,
        text(2, PROMPT),
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    past.check_integrity()
    assert past.report().entries <= 2 * 2 * 6 * (TIGHT + ANSWER)
    assert len(set(map(tuple, out.sequences.tolist()))) == 6
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        alone = kvthrift.Cache(model.config, method, **options)  # type: ignore[arg-type]
        total, ids = 0.0, sequence[None, :PROMPT]
        with torch.inference_mode():
            for token in sequence[PROMPT:]:
                logits = model(input_ids=ids, past_key_values=alone).logits[0, -1]
                total += float(logits.log_softmax(-1)[token])
                ids = token.view(1, 1)
        assert total == pytest.approx(float(score), abs=2e-3)


class Collector(BaseStreamer):
    """Tokens as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("budget", [ROOMY, TIGHT])
def test_streaming_brings_the_tokens_one_by_one(budget: int) -> None:
    streamer = Collector()
    made = generate(tiny("llama"), cache("llama", budget), streamer=streamer)
    assert streamer.tokens == made[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_turns_of_a_talk_are_read_on(name: str) -> None:
    """The second question comes with the whole talk so far; only what is new is read."""
    past, (model, stock) = kvthrift.Cache(tiny(name).config, "snapkv", budget=300), plain(name)
    ours = theirs = text(1, PROMPT)
    for turn, length in enumerate((5, 40, 1)):
        ours, theirs = generate(tiny(name), past, ours), generate(model, stock, theirs)
        assert torch.equal(ours, theirs)
        assert past.get_seq_length() == stock.get_seq_length() == ours.shape[1] - 1
        more = text(1, length, seed=turn)
        ours, theirs = torch.cat((ours, more), dim=1), torch.cat((theirs, more), dim=1)


def test_turns_are_compressed_when_they_are_long() -> None:
    past = cache("llama", TIGHT)
    ids = generate(tiny("llama"), past)
    held = TIGHT + ANSWER - 1
    for length, expected in ((10, held + 11 + ANSWER - 1), (40, TIGHT + ANSWER - 1)):
        ids = generate(tiny("llama"), past, torch.cat((ids, text(1, length)), dim=1))
        assert {row.most for row in past.report().layers} == {expected}
    assert past.report().tokens == (ids.shape[1] - 1,)


@pytest.mark.parametrize("size", [16, 33, 200])
def test_a_prompt_may_be_prefilled_in_chunks_by_generate(size: int) -> None:
    made = generate(tiny("llama"), cache("llama"), prefill_chunk_size=size)
    assert torch.equal(made, generate(*plain("llama")))


def test_the_cache_is_handed_back() -> None:
    past = cache("llama", TIGHT)
    out = generate(tiny("llama"), past, return_dict_in_generate=True, output_logits=True)
    assert out.past_key_values is past
    assert past.get_seq_length() == PROMPT + ANSWER - 1


def test_half_precision_beams_and_samples_run() -> None:
    model = build(config("llama")).to(torch.bfloat16)
    for mode in ("beams", "several samples"):
        past = kvthrift.Cache(model.config, "adakv", budget=TIGHT)
        made = generate(model, past, **MODES[mode])
        assert made.shape[1] == PROMPT + ANSWER
        past.check_integrity()
