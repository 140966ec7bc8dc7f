"""What goes wrong while a cache decodes is said with its sizes, and leaves the cache as it was or as good as new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, text, tiny
from torch import Tensor

import kvthrift
from kvthrift.errors import CacheStateError, KvthriftError, NoRoomError
from kvthrift.runtime.fixed import FixedSteps
from kvthrift.store import pool

PROMPT, PAGE = 90, 16
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv": {"budget": 40},
    "adakv": {"budget": 40},
    "h2o": {"budget": 40, "every": 60},
    "snapkv, int8": {"budget": 40, "codec": "int8"},
}


def read(name: str) -> kvthrift.Cache:
    return kvthrift.prefill(tiny("llama"), text(2, PROMPT), name.partition(",")[0], page=PAGE, **METHODS[name])


@torch.inference_mode()
def go_on(past: kvthrift.Cache, ids: Tensor) -> Tensor:
    logits: Tensor = tiny("llama")(input_ids=ids, past_key_values=past).logits
    return logits


def same_entries(past: kvthrift.Cache, twin: kvthrift.Cache) -> None:
    for mine, theirs in zip(past.state.layers, twin.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        one, other, valid = mine.store.read(), theirs.store.read(), theirs.store.valid()
        assert torch.equal(mine.store.valid(), valid)
        torch.testing.assert_close(one.keys[valid], other.keys[valid], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.values[valid], other.values[valid], atol=1e-5, rtol=1e-5)


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[int]]:
    """Memory for pages runs out after so many tensors; how many were asked for."""
    asked, fresh = [0], pool._fresh

    def scarce(*args: Any) -> Tensor:
        asked[0] += 1
        if asked[0] > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return fresh(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_fresh", scarce)
        yield asked


@pytest.mark.parametrize("after", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_without_room_leaves_all_layers_as_they_were(
    name: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever tensor of whichever layer finds no room, in steps of one token and of several."""
    for width in (1, 5):
        past = read(name)
        twin, steps = read(name), text(2, 40, seed=7).split(width, dim=1)
        failed = 0
        for ids in steps:
            found, why = None, ""
            with no_room(monkeypatch, after):
                try:
                    found = go_on(past, ids)
                except NoRoomError as error:
                    why = str(error)
            said = [x in why for x in ("pages of 16 entries take", "MiB", "The cache is as it was")]
            assert all(said) if found is None else not any(said)
            failed += found is None
            assert past.get_seq_length() == twin.get_seq_length() + (0 if found is None else ids.shape[1])
            past.check_integrity()
            if found is None:
                same_entries(past, twin)
                found = go_on(past, ids)  # there is room again
            torch.testing.assert_close(found, go_on(twin, ids), atol=1e-5, rtol=1e-5)
        assert failed


@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize("name", ["full", "adakv", "snapkv, int8"])
def test_pages_that_are_taken_ahead(name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose pages are taken ahead, as for a CUDA graph, are refused before the first."""
    past, twin = read(name), read(name)
    with no_room(monkeypatch, after), pytest.raises(NoRoomError, match="pages of 16 entries take"):
        FixedSteps(past.state, 200)
    past.check_integrity()
    same_entries(past, twin)
    ids = text(2, 20, seed=7)
    torch.testing.assert_close(go_on(past, ids), go_on(twin, ids), atol=1e-5, rtol=1e-5)
    with FixedSteps(past.state, 20) as steps, torch.inference_mode():
        tiny("llama")(input_ids=ids[:, :1], position_ids=steps.positions[:, None], past_key_values=past)


def test_it_is_an_error_of_memory_too() -> None:
    made = pool.PagePool(PAGE, 64, 64, torch.float32, torch.device("cpu"))
    made.take(3)
    with pytest.raises(MemoryError, match="out of memory: 100000000000 pages of 16 entries take"):
        made.resize(10**11)  # no machine has that
    assert made.total == 3
    assert [len(t) for t in made.tensors()] == [3, 3, 3]
    assert issubclass(NoRoomError, KvthriftError)


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    past = read("adakv")

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(pool, "_fresh", broken)
    with pytest.raises(RuntimeError, match="something else"):
        go_on(past, text(2, 40))


@contextmanager
def odd_keys(layer: int, number: float) -> Iterator[None]:
    """One key of every pass inside is not finite."""
    projection = tiny("llama").model.layers[layer].self_attn.k_proj

    def spoil(_: Any, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, out.shape[1] // 2, 3] = number
        return out

    handle = projection.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "streamingllm", "pyramidkv", "keydiff", "lava"])
def test_keys_that_are_not_finite_choose_nothing(method: str, number: float) -> None:
    model, ids = tiny("llama"), text(2, PROMPT)
    past = kvthrift.Cache(model.config, method, budget=48, page=PAGE)
    with odd_keys(1, number), pytest.raises(CacheStateError, match="keys of layer 1 are infinite or not a number"):
        go_on(past, ids)
    with pytest.raises(CacheStateError, match="reset"):
        go_on(past, ids[:, :1])
    past.reset()
    assert go_on(past, ids).isfinite().all()
    past.check_integrity()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nor_do_those_of_decoded_tokens(number: float, fixed: bool) -> None:
    past = kvthrift.prefill(tiny("llama"), text(1, PROMPT), "snapkv", budget=40, page=PAGE, every=8)
    fork, tokens = past.fork(), torch.randint(1, VOCABULARY, (8, 1))
    with odd_keys(0, number):
        if fixed:
            with FixedSteps(past.state, 8) as steps, torch.inference_mode():
                for token in tokens:
                    at = steps.positions[:, None].clone()
                    tiny("llama")(input_ids=token[None], position_ids=at, past_key_values=past)
                    steps.positions.add_(1)
                    steps.taken += 1
        else:
            for token in tokens:
                go_on(past, token[None])
    with pytest.raises(CacheStateError, match="keys of layer 0 are"):
        go_on(past, tokens[:1])
    for token in tokens:
        assert go_on(fork, token[None]).isfinite().all()  # made before, and none the worse
    assert go_on(fork, tokens[:1]).isfinite().all()
