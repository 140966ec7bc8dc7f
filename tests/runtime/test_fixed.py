"""Steps whose book-keeping is the device's leave the cache as ordinary steps do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models import VOCABULARY, tiny

import kvthrift
from kvthrift.errors import CacheStateError
from kvthrift.runtime.fixed import FixedSteps

METHODS = {"full": None, "snapkv": 40, "adakv": 40, "lava": 40, "streamingllm": 40}


def read(method: str, batch: int = 1, merge: bool = False, codec: str | None = None) -> tuple[object, kvthrift.Cache]:
    model = tiny("llama")
    ids = torch.randint(1, VOCABULARY, (batch, 90))
    options = {"merge": "fold"} if merge else {}
    options |= {"codec": codec} if codec else {}
    cache = kvthrift.prefill(model, ids, method, budget=METHODS[method], page=16, **options)
    return model, cache


@torch.no_grad()
def decode(model: object, cache: kvthrift.Cache, tokens: torch.Tensor, fixed: bool) -> torch.Tensor:
    """Logits of every step ``[B, steps, vocabulary]``."""
    logits = []
    if not fixed:
        for token in tokens.T:
            logits.append(model(input_ids=token[:, None], past_key_values=cache).logits[:, -1])  # type: ignore[operator]
        return torch.stack(logits, dim=1)
    with FixedSteps(cache.state, tokens.shape[1]) as steps:
        for token in tokens.T:
            out = model(input_ids=token[:, None], position_ids=steps.positions[:, None], past_key_values=cache)  # type: ignore[operator]
            logits.append(out.logits[:, -1])
            steps.positions.add_(1)
            steps.taken += 1
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(("merge", "codec"), [(False, None), (True, None), (False, "int8"), (True, "int2")])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_they_say_and_hold_what_ordinary_steps_do(method: str, batch: int, merge: bool, codec: str | None) -> None:
    if merge and method in ("full", "streamingllm"):
        pytest.skip("nothing goes that has a mass, so nothing is folded")
    model, cache = read(method, batch, merge, codec)
    other = cache.fork()
    tokens = torch.randint(1, VOCABULARY, (batch, 40))
    near = 1e-2 if codec else 1e-4  # a last bit in the model may be a level of a number in few bits
    torch.testing.assert_close(
        decode(model, cache, tokens, fixed=True), decode(model, other, tokens, fixed=False), atol=near, rtol=near
    )
    assert cache.get_seq_length() == other.get_seq_length() == 130
    for mine, theirs in zip(cache.state.layers, other.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        assert np.array_equal(mine.store.lengths, theirs.store.lengths)
        assert mine.since == theirs.since
        valid = mine.store.valid()
        assert torch.equal(mine.store.positions()[valid], theirs.store.positions()[valid])
        off = (mine.store.read().keys[valid] - theirs.store.read().keys[valid]).abs()
        assert (off > 1e-4).float().mean() <= (0.01 if codec else 0.0)
        assert torch.equal(
            mine.store.paged().lengths.long().view(batch, -1).cpu(), torch.from_numpy(theirs.store.lengths)
        )
    del other
    cache.check_integrity()
    again = decode(model, cache, tokens[:, :3], fixed=False)  # ordinary steps go on from there
    assert again.isfinite().all()


def test_trial_steps_leave_no_trace() -> None:
    model, cache = read("adakv")
    tokens = torch.randint(1, VOCABULARY, (1, 6))
    other = cache.fork()
    with FixedSteps(cache.state, 10) as steps, torch.no_grad():
        for _ in range(3):
            model(input_ids=tokens[:, :1], position_ids=steps.positions[:, None], past_key_values=cache)  # type: ignore[operator]
            steps.positions.add_(1)
            steps.restart()
    assert cache.get_seq_length() == 90
    torch.testing.assert_close(
        decode(model, cache, tokens, fixed=False), decode(model, other, tokens, fixed=False), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("codec", ["int4", "fp8"])
def test_a_trial_that_writes_a_full_page_is_taken_back_too(codec: str) -> None:
    model = tiny("llama")
    ids, tokens = torch.randint(1, VOCABULARY, (1, 90)), torch.randint(1, VOCABULARY, (1, 6))
    cache = kvthrift.prefill(model, ids, "snapkv", budget=48, page=16, codec=codec)  # three pages a head, the last full
    other = cache.fork()
    with FixedSteps(cache.state, 10) as steps, torch.no_grad():
        assert steps.bytes > 0
        for _ in range(3):
            model(input_ids=tokens[:, 1:2], position_ids=steps.positions[:, None], past_key_values=cache)
            steps.positions.add_(1)
            steps.restart()
        steps.settle()
        with pytest.raises(CacheStateError, match="settle"):
            steps.restart()
    torch.testing.assert_close(
        decode(model, cache, tokens, fixed=False), decode(model, other, tokens, fixed=False), atol=1e-4, rtol=1e-4
    )


def test_a_fork_is_not_written_to() -> None:
    model, cache = read("snapkv")
    fork = cache.fork()
    before = [layer.store.read().keys.clone() for layer in fork.state.layers if layer.store is not None]
    decode(model, cache, torch.randint(1, VOCABULARY, (1, 20)), fixed=True)
    for layer, keys in zip(fork.state.layers, before, strict=True):
        assert layer.store is not None
        assert torch.equal(layer.store.read().keys, keys)


def test_an_empty_cache_has_no_steps() -> None:
    with pytest.raises(CacheStateError, match="prompt"):
        FixedSteps(kvthrift.Cache(tiny("llama").config, "snapkv", budget=64).state, 4)


@torch.no_grad()
def test_more_than_one_token_is_refused() -> None:
    model, cache = read("snapkv")
    with FixedSteps(cache.state, 4), pytest.raises(CacheStateError, match="one token"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)  # type: ignore[operator]
    assert cache.get_seq_length() == 90
