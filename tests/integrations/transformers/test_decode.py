"""Greedy decoding against transformers' own ``generate``."""

from __future__ import annotations

import pytest
import torch
from tests.models import build, config, text, tiny

from kvthrift import Cache, ContextError, prefill
from kvthrift.integrations.transformers.decode import end_tokens, greedy

PROMPT = text(1, 50)


@pytest.mark.parametrize("read", [0, 20, 49])
def test_it_says_what_generate_says(read: int) -> None:
    model = tiny("llama")
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False, past_key_values=Cache(model.config))[0, 50:]
    cache = prefill(model, PROMPT[:, :read]) if read else Cache(model.config)
    heard: list[int] = []
    decoded = greedy(model, PROMPT[:, read:], cache, 12, heard.append)
    assert list(decoded.tokens) == heard == expected.tolist()
    assert len(decoded.step_seconds) == 11
    assert decoded.prefill_seconds > 0
    assert decoded.tokens_per_second is not None
    assert cache.get_seq_length() == 50 + 11


@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_ends_it(several: bool) -> None:
    model = build(config("llama"))
    tokens = greedy(model, PROMPT, Cache(model.config), 12).tokens
    end = tokens[4]
    model.generation_config.eos_token_id = [198, end] if several else end
    assert end_tokens(model) == ({198, end} if several else {end})
    assert greedy(model, PROMPT, Cache(model.config), 12).tokens == tokens[: tokens.index(end) + 1]


def test_one_token_has_no_speed() -> None:
    model = tiny("llama")
    assert greedy(model, PROMPT, Cache(model.config), 1).tokens_per_second is None


@pytest.mark.parametrize(("shape", "new"), [((1, 0), 3), ((2, 3), 3), ((1, 3), 0)])
def test_nothing_to_decode_is_refused(shape: tuple[int, int], new: int) -> None:
    model = tiny("llama")
    with pytest.raises(ContextError, match="nothing to decode"):
        greedy(model, torch.ones(shape, dtype=torch.long), Cache(model.config), new)
