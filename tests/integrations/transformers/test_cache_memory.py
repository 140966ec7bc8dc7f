"""Memory is really freed: a report's bytes are those of the tensors that live, and the full keys and values do not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from tests.live import live_bytes, live_tensors
from tests.models import build, config, text, tiny
from torch import Tensor

import kvthrift

PROMPT, BUDGET = 400, 64
DECODING = (("tova", {"decode": True}), ("h2o", {"decode": True}), ("chunkkv", {"reuse": 2, "every": 3}))


@torch.inference_mode()
def read(name: str, past: kvthrift.Cache, ids: Tensor) -> None:
    tiny(name)(input_ids=ids, past_key_values=past, logits_to_keep=1)


def in_process() -> int:
    """Bytes of all tensors that Python knows of."""
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]  # a proxy's own answer may warn
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "method", ["snapkv", "adakv", "lava", "h2o", "expected_attention", "criticalkv", "streamingllm"]
)
def test_the_process_holds_what_the_report_says(method: str, no_collection: None) -> None:
    ids = text(2, PROMPT)
    read("llama", kvthrift.Cache(tiny("llama").config, method, budget=BUDGET), ids)  # whatever is made once
    gc.collect()
    before = in_process()
    past = kvthrift.Cache(tiny("llama").config, method, budget=BUDGET)
    read("llama", past, ids)
    report = past.report()
    assert in_process() - before == report.bytes
    assert report.bytes < 0.5 * report.full_bytes
    del past
    assert in_process() == before  # without the garbage collector's help


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_nothing_refers_to_the_full_keys_and_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    past = kvthrift.Cache(tiny(name).config, "snapkv", budget=BUDGET)
    update = type(past).update

    def watched(self: kvthrift.Cache, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> object:
        seen.extend((weakref.ref(k), weakref.ref(v)))
        return update(self, k, v, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(past), "update", watched)
    read(name, past, text(1, PROMPT))
    read(name, past, text(1, 1))  # transformers' own sliding layers let go only now
    gc.collect()
    assert seen
    assert not any(ref() is not None for ref in seen)
    longest = max(t.untyped_storage().nbytes() for t in live_tensors(past))
    whole = PROMPT * 2 * 16 * 4  # keys of one layer
    assert longest < whole


@pytest.mark.parametrize(("method", "options"), DECODING)
def test_bytes_stay_exact_while_decoding(method: str, options: dict[str, object]) -> None:
    past = kvthrift.Cache(tiny("llama").config, method, budget=60, page=16, **options)  # type: ignore[arg-type]
    read("llama", past, text(2, PROMPT))
    held = []
    for step in range(40):
        read("llama", past, text(2, 1, seed=step))
        assert past.report().bytes == live_bytes(past)
        held.append(past.report().bytes)
    assert max(held) <= 1.1 * held[0]
    past.check_integrity()


def test_the_peak_is_one_layer_and_the_budget() -> None:
    """Five layers are cut as they are read: never are two of them whole."""
    model = build(config("llama", num_hidden_layers=5))
    past = kvthrift.Cache(model.config, "knorm", budget=BUDGET)
    between: list[int] = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda *_: between.append(live_bytes(past.state.layers)))
    with torch.inference_mode():
        model(input_ids=text(1, 1600), past_key_values=past, logits_to_keep=1)
    report = past.report()
    whole = report.full_bytes // 5
    one = report.bytes // 5
    assert between == [report.bytes - one * (4 - done) for done in range(5)]
    assert whole + 4 * one <= report.peak_bytes <= whole + 6 * one
    assert report.peak_bytes < 0.5 * report.full_bytes


def test_an_uncompressed_cache_costs_little_more_than_transformers_own() -> None:
    past = kvthrift.Cache(tiny("llama").config)
    read("llama", past, text(2, 1600))
    report = past.report()
    assert report.entries == report.full_entries
    assert report.full_bytes < report.bytes < 1.06 * report.full_bytes  # 3% positions at this head dim


def test_metadata_is_what_is_neither_keys_nor_values() -> None:
    past = kvthrift.Cache(tiny("llama").config, "h2o", budget=BUDGET, decode=True)
    read("llama", past, text(2, PROMPT))
    report = past.report()
    payload = sum(
        t.untyped_storage().nbytes()
        for layer in past.state.layers
        if layer.store is not None
        for t in (layer.store.pool.keys, layer.store.pool.values)
    )
    assert report.metadata_bytes == report.bytes - payload
    heads = 2 * 2 * 2
    assert report.metadata_bytes >= heads * BUDGET * (4 + 4)  # positions and column sums
    assert sum(row.bytes for row in report.layers) == report.bytes
