"""Steps whose book-keeping is the device's leave the cache as ordinary steps do."""

from __future__ import annotations

from typing import Any

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


def test_layers_that_are_cut_alike_share_their_scratch() -> None:
    model, cache = read("adakv")
    lengths = [layer.store.lengths.tolist() for layer in cache.state.layers if layer.store is not None]
    assert lengths[0] != lengths[1]
    with FixedSteps(cache.state, 4) as steps, torch.no_grad():
        model(  # type: ignore[operator]
            input_ids=torch.ones(1, 1, dtype=torch.long), position_ids=steps.positions[:, None], past_key_values=cache
        )
        steps.positions.add_(1)
        assert len(steps._plans) == 1


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


WATCHING = {
    "snapkv": {"budget": 40},
    "adakv": {"budget": 40},
    "cake": {"budget": 48},
    "lava": {"budget": 48},
    "tova": {"budget": 40},
    "h2o": {"budget": 40},
    "kv_compress": {"budget": 48},
    "expected_attention": {"budget": 40},
    "keydiff": {"budget": 40},
}


@torch.no_grad()
def answer(model: Any, cache: kvthrift.Cache, count: int, fixed: bool) -> torch.Tensor:
    """Tokens ``[B, count]`` from the likeliest on; steps are of fixed room wherever at least three may be taken."""
    state, batch = cache.state, cache.batch_size
    token, made = torch.arange(5, 5 + batch), list[torch.Tensor]()
    while len(made) < count:
        due = state.until_due
        room = min(count - len(made), count if due is None else due) if fixed else 0
        if room < 3:
            made.append(model(input_ids=token[:, None], past_key_values=cache).logits[:, -1].argmax(-1))
            token = made[-1]
            continue
        with FixedSteps(state, room) as steps:
            for _ in range(room):
                at = steps.positions[:, None].clone()
                out = model(input_ids=token[:, None], position_ids=at, past_key_values=cache)
                steps.positions.add_(1)
                steps.taken += 1
                made.append(out.logits[:, -1].argmax(-1))
                token = made[-1]
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("every", [7, 20])
@pytest.mark.parametrize("method", WATCHING)
def test_what_is_decoded_is_compressed_as_by_ordinary_steps(method: str, every: int, merge: bool) -> None:
    """Rings of queries, moments and sums of attention are those that ordinary steps gather, compression included."""
    if merge and method not in ("snapkv", "h2o", "adakv"):
        pytest.skip("one of each kind will do")
    model, ids = tiny("llama"), torch.randint(1, VOCABULARY, (2, 90))
    options = {**WATCHING[method], "every": every, "page": 16, **({"merge": "fold"} if merge else {})}
    cache = kvthrift.prefill(model, ids, method, **options)
    other = cache.fork()
    assert torch.equal(answer(model, cache, 45, fixed=True), answer(model, other, 45, fixed=False))
    assert cache.state.meter.compressions > 0
    assert cache.get_seq_length() == other.get_seq_length() == 135
    for mine, theirs in zip(cache.state.layers, other.state.layers, strict=True):
        same_layer(mine, theirs)
    del other, theirs
    cache.check_integrity()


def same_layer(mine: Any, theirs: Any) -> None:
    assert mine.since == theirs.since
    assert np.array_equal(mine.store.lengths, theirs.store.lengths)
    valid = mine.store.valid()
    assert torch.equal(mine.store.positions()[valid], theirs.store.positions()[valid])
    for plane in mine.store.pool.planes:
        torch.testing.assert_close(
            mine.store.plane(plane)[valid], theirs.store.plane(plane)[valid], atol=1e-4, rtol=1e-4
        )
    assert (mine.window is None) == (theirs.window is None)
    if mine.window is not None:
        assert torch.equal(mine.window.positions, theirs.window.positions)
        torch.testing.assert_close(mine.window.queries, theirs.window.queries, atol=1e-4, rtol=1e-4)
    if mine.statistics is not None:
        for part in ("count", "total", "outer"):
            one, other = (getattr(x.statistics.moments, part) for x in (mine, theirs))
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "expected_attention"])
def test_trial_steps_leave_no_trace_in_what_is_gathered(method: str) -> None:
    model, ids = tiny("llama"), torch.randint(1, VOCABULARY, (2, 90))
    cache = kvthrift.prefill(model, ids, method, budget=40, page=16, every=20)
    other = cache.fork()
    with FixedSteps(cache.state, 20) as steps, torch.no_grad():
        assert steps.bytes > 0
        for _ in range(2):
            for _ in range(3):
                at = steps.positions[:, None].clone()
                model(input_ids=torch.full((2, 1), 7), position_ids=at, past_key_values=cache)
                steps.positions.add_(1)
            steps.restart()
        steps.settle()
    assert torch.equal(answer(model, cache, 30, fixed=True), answer(model, other, 30, fixed=False))
    for mine, theirs in zip(cache.state.layers, other.state.layers, strict=True):
        same_layer(mine, theirs)


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_a_fork_keeps_what_it_observed(method: str) -> None:
    model, ids = tiny("llama"), torch.randint(1, VOCABULARY, (1, 90))
    cache = kvthrift.prefill(model, ids, method, budget=40, page=16, every=20)
    fork, twin = cache.fork(), kvthrift.prefill(model, ids, method, budget=40, page=16, every=20)
    answer(model, cache, 15, fixed=True)
    for mine, theirs in zip(fork.state.layers, twin.state.layers, strict=True):
        same_layer(mine, theirs)


def test_room_ends_where_compression_is_due() -> None:
    model, ids = tiny("llama"), torch.randint(1, VOCABULARY, (1, 90))
    cache = kvthrift.prefill(model, ids, "snapkv", budget=40, every=8)
    answer(model, cache, 3, fixed=False)
    assert cache.state.until_due == 5
    with pytest.raises(CacheStateError, match="due in 5"):
        FixedSteps(cache.state, 6)
    FixedSteps(cache.state, 5)


def test_sums_over_pages_in_few_bits_are_left_to_ordinary_steps() -> None:
    model, ids = tiny("llama"), torch.randint(1, VOCABULARY, (1, 90))
    cache = kvthrift.prefill(model, ids, "h2o", budget=48, every=8, codec="int8")
    with pytest.raises(CacheStateError, match="few bits"):
        FixedSteps(cache.state, 4)
