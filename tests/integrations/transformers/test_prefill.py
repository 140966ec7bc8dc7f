"""A context read once, compressed before any question is seen, asked many times; in chunks, without a peak."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import APART
from tests.live import live_bytes
from tests.masked import MaskedModel, kept
from tests.models import text, tiny
from tests.reading import DECIDES
from torch import Tensor
from transformers import PreTrainedModel

import kvthrift
from kvthrift.errors import ContextError, OptionError, UnsupportedModelError

CONTEXT, BUDGET = 200, 48
CUTTING = [name for name in kvthrift.methods() if name not in ("full", *APART, *DECIDES)]


@torch.inference_mode()
def read(name: str, past: kvthrift.Cache, ids: Tensor) -> Tensor:
    logits: Tensor = tiny(name)(input_ids=ids, past_key_values=past, use_cache=True).logits
    return logits


def ask(model: PreTrainedModel, past: kvthrift.Cache, context: Tensor, question: Tensor) -> Tensor:
    ids = torch.cat((context, question), dim=1)
    made: Tensor = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=12, do_sample=False
    )
    return made[:, ids.shape[1] :]


# -- many questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "h2o"])
def test_questions_do_not_see_each_other(name: str, method: str) -> None:
    model, context = tiny(name), text(2, CONTEXT)
    options = {} if method == "full" else {"budget": BUDGET}
    held = kvthrift.prefill(model, context, method, page=16, **options)  # type: ignore[arg-type]
    before = {number: mask.clone() for number, mask in kept(held).items()}
    questions = [text(2, length, seed=length) for length in (3, 40, 11)]
    forks = [held.fork() for _ in questions]
    answers = [ask(model, fork, context, question) for fork, question in zip(forks, questions, strict=True)]
    for question, answer in zip(questions, answers, strict=True):
        alone = kvthrift.prefill(model, context, method, page=16, **options)  # type: ignore[arg-type]
        assert torch.equal(ask(model, alone, context, question), answer)
    assert held.get_seq_length() == CONTEXT
    assert all(torch.equal(mask, before[number]) for number, mask in kept(held).items())
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 3


def test_a_long_question_is_added_and_not_compressed() -> None:
    model, context = tiny("llama"), text(1, CONTEXT)
    held = kvthrift.prefill(model, context, "snapkv", budget=BUDGET)
    ask(model, held, context, text(1, 60))
    assert {row.most for row in held.report().layers} == {BUDGET + 60 + 11}


def test_what_is_kept_does_not_depend_on_the_question() -> None:
    """Asked in one pass with its context, the question does decide."""
    model, context = tiny("llama"), text(1, CONTEXT)
    kept_with = []
    for seed in (1, 2):
        past = kvthrift.Cache(model.config, "snapkv", budget=BUDGET)
        read("llama", past, torch.cat((context, text(1, 32, seed=seed)), dim=1))
        kept_with.append(kept(past)[0][..., :CONTEXT])
    assert not torch.equal(*kept_with)
    hidden = kept(kvthrift.prefill(model, context, "snapkv", budget=BUDGET))[0]
    assert not any(torch.equal(hidden, mask) for mask in kept_with)


# -- in chunks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 16, 33, 64, 199, 500])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_say_the_same_while_everything_fits(name: str, chunk: int) -> None:
    model, context, more = tiny(name), text(2, CONTEXT), text(2, 3)
    whole = read(name, kvthrift.prefill(model, context, "snapkv", budget=CONTEXT), more)
    past = kvthrift.prefill(model, context, "snapkv", budget=CONTEXT, chunk=chunk)
    assert past.get_seq_length() == CONTEXT
    torch.testing.assert_close(read(name, past, more), whole, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 40, 64])
@pytest.mark.parametrize("method", CUTTING)
def test_chunks_meet_the_budget_however_short_they_are(method: str, chunk: int) -> None:
    past = kvthrift.prefill(tiny("llama"), text(2, CONTEXT), method, budget=BUDGET, chunk=chunk, page=16)
    report = past.report()
    spare = 10 if method == "chunkkv" else 0
    heads = 2 * 2 * 2
    assert (BUDGET - spare) * heads <= report.entries <= BUDGET * heads
    assert report.bytes == live_bytes(past)
    past.check_integrity()
    recent = past.recipe.protect.recent
    assert all(mask[..., CONTEXT - recent :].all() for mask in kept(past).values())


def test_each_chunk_reads_what_was_kept_of_earlier_ones() -> None:
    model, context, chunk = tiny("llama"), text(2, CONTEXT), 50
    truth = MaskedModel("llama")
    held = None
    for stop in range(chunk, CONTEXT + 1, chunk):
        truth.read(context[:, stop - chunk : stop], held)
        past = kvthrift.prefill(model, context[:, :stop], "snapkv", budget=BUDGET, chunk=chunk)
        held = kept(past)
    more = text(2, 4)
    torch.testing.assert_close(read("llama", past, more), truth.read(more, held), atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "expected_attention", "lava"])
def test_the_peak_does_not_grow_with_the_context(method: str) -> None:
    peaks = [
        kvthrift.prefill(tiny("llama"), text(1, length), method, budget=64, chunk=100).report().peak_bytes
        for length in (400, 1600)
    ]
    assert peaks[1] <= 1.1 * peaks[0]
    whole = kvthrift.prefill(tiny("llama"), text(1, 1600), method, budget=64).report()
    assert peaks[1] < 0.5 * whole.peak_bytes


def test_observations_are_dropped_when_the_context_is_read() -> None:
    past = kvthrift.prefill(tiny("llama"), text(1, CONTEXT), "snapkv", budget=BUDGET, chunk=50)
    assert all(layer.window is None for layer in past.state.layers)


def test_sliding_layers_hold_no_more_than_their_window() -> None:
    """Transformers keeps a view of the whole prompt until the next token comes; a context may wait long for it."""
    past = kvthrift.prefill(tiny("gemma3"), text(1, CONTEXT), "snapkv", budget=BUDGET)
    for row in past.report().layers[::2]:
        assert row.bytes <= 2 * 23 * 2 * 16 * 4 + 8
    assert live_bytes(past) == past.report().bytes == live_bytes(past.fork())


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (4,)])
def test_a_context_without_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ContextError, match="no tokens"):
        kvthrift.prefill(tiny("llama"), torch.ones(shape, dtype=torch.long))


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(ContextError, match=r"5000 tokens, .* at most 4096"):
        kvthrift.prefill(tiny("llama"), text(1, 5000))


@pytest.mark.parametrize("chunk", [1, 0, -5])
def test_chunks_of_less_than_two_tokens_are_refused(chunk: int) -> None:
    with pytest.raises(OptionError, match=f"chunk={chunk}"):
        kvthrift.prefill(tiny("llama"), text(1, 10), chunk=chunk)


def test_a_model_that_would_ignore_the_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        kvthrift.prefill(tiny("llama", "sdpa"), text(1, 10))
