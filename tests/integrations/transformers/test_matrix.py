"""Every method on every architecture: nothing changes while all fits, and when not, what was promised is held."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.fitted import DELIMITERS, fitted_to
from tests.live import live_bytes
from tests.models import text, tiny
from tests.reading import DECIDES, TWICE
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

import kvthrift

MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "qwen3_moe", "gpt_neox", "gemma3", "cohere", "opt")
UNCHECKED_ROPE = ("cohere", "opt")  # models whose rotary embedding kvthrift does not know ...
NEEDS_ROPE = ("expected_attention", "triattention")  # ... methods that ask for it as they read ...
TURNS_KEYS = ("kvzap",)  # ... and those that ask once they compress
WHOLE = {"gemma3": (0, 2)}  # layers that are not compressed
BATCH, PROMPT, ANSWER, BUDGET, PAGE = 2, 150, 64, 48, 16


def recipe(name: str, config: PreTrainedConfig, budget: int) -> kvthrift.Recipe:
    """The method at its defaults; one that needs a calibration gets a made-up one for this model."""
    if name == "full":
        return kvthrift.method(name)
    own = {"skip": ()} if name in DECIDES else {}  # the layers that it leaves whole are all that a tiny model has
    return fitted_to(kvthrift.method(name, budget=budget, **own), config)


@cache
def answer_without_kvthrift(name: str) -> Tensor:
    model = tiny(name, "sdpa")
    return generate(model, DynamicCache(config=model.config), ANSWER)


def started(model: PreTrainedModel, wanted: kvthrift.Recipe, **options: int) -> tuple[kvthrift.Cache, int]:
    """A cache for the prompt, and how many tokens of it come after compression: those that look twice leave one."""
    if wanted.name not in TWICE:
        past = kvthrift.Cache(model.config, wanted, **options)
        past.tell(text(BATCH, PROMPT), delimiters=DELIMITERS)
        return past, 0
    return kvthrift.prefill(model, text(BATCH, PROMPT)[:, :-1], wanted, **options), 1


def generate(model: torch.nn.Module, past: object, count: int) -> Tensor:
    ids = text(BATCH, PROMPT)
    made: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=count,
        do_sample=False,
    )
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_models_say_different_things(name: str) -> None:
    """Otherwise comparing tokens would show nothing."""
    answer = answer_without_kvthrift(name)[:, PROMPT:]
    assert all(len(set(row.tolist())) >= 8 for row in answer)
    assert not torch.equal(answer[0], answer[1])


@pytest.mark.parametrize("method", kvthrift.methods())
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_while_everything_fits(name: str, method: str) -> None:
    model = tiny(name)
    past, _ = started(model, recipe(method, model.config, PROMPT + ANSWER))
    if name in UNCHECKED_ROPE and method in NEEDS_ROPE:
        with pytest.raises(kvthrift.MissingSignalError, match="has not checked"):
            generate(model, past, ANSWER)
        return
    assert torch.equal(generate(model, past, ANSWER), answer_without_kvthrift(name))
    report = past.report()
    assert report.entries == report.full_entries
    assert report.compressions == 0


HONOURED = [
    (name, method)
    for name in MODELS
    for method in kvthrift.methods()
    if method != "full" and not (name in UNCHECKED_ROPE and method in (*NEEDS_ROPE, *TURNS_KEYS))
]


@pytest.mark.parametrize("method", TURNS_KEYS)
@pytest.mark.parametrize("name", UNCHECKED_ROPE)
def test_an_unknown_rotation_is_refused_once_it_matters(name: str, method: str) -> None:
    model = tiny(name)
    past, _ = started(model, recipe(method, model.config, BUDGET), page=PAGE)
    with pytest.raises(kvthrift.MissingSignalError, match="has not checked"):
        generate(model, past, 2)


@pytest.mark.parametrize(("name", "method"), HONOURED)
def test_a_cut_cache_holds_what_it_promises(name: str, method: str) -> None:
    model, count = tiny(name), 6
    past, later = started(model, recipe(method, model.config, BUDGET), page=PAGE)
    made = generate(model, past, count)
    assert made.shape == (BATCH, PROMPT + count)
    past.check_integrity()
    report = past.report()
    assert report.tokens == (PROMPT + count - 1,) * BATCH
    whole = WHOLE.get(name, ())
    cut = [row for row in report.layers if row.layer not in whole]
    assert report.compressions >= len(cut)
    decoded = count - 1 + later
    assert all(row.fewest > decoded for row in cut)  # no head is left with nothing
    spare = 10 if method == "chunkkv" else 0  # keeps whole chunks only
    mean = sum(row.mean for row in cut) / len(cut)
    assert BUDGET - spare <= mean - decoded <= BUDGET
    assert report.entries == sum(round(row.mean * row.heads * BATCH) for row in cut)
    assert report.bytes == live_bytes(past)
    pages = len(cut) * cut[0].heads * BATCH  # one spare page a head at most
    per_entry = report.full_bytes / (PROMPT + count - 1) / BATCH / cut[0].heads / len(cut)
    if not whole:
        assert report.bytes <= 1.3 * (report.entries + pages * PAGE) * per_entry
        assert report.share < 0.7
    for row in report.layers:
        assert ("left whole" in row.note) == (row.layer in whole)
