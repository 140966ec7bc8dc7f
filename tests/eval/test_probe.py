"""What is read off a cache: positions, bytes, where heads look."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import APART
from tests.live import live_bytes
from tests.models import text, tiny

import kvthrift
from kvthrift import method
from kvthrift.eval.decode import Decoder, read
from kvthrift.eval.probe import held, positions

IDS = text(1, 150, seed=5)[0].tolist()
NAMES = [name for name in kvthrift.methods() if name not in ("full", *APART)]
RECIPES = [method(name, budget=48) for name in NAMES]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_heads_look_where_eager_attention_peaks(name: str) -> None:
    eager, model = tiny(name, "eager"), tiny(name)
    decoder = Decoder(model, read(model, IDS, method("full"), page=16).cache, [torch.zeros(1)])
    decoder.step(17)
    with torch.no_grad():
        maps = eager(input_ids=torch.tensor([[*IDS, 17]]), output_attentions=True).attentions
    numbers = [layer.number for layer in decoder.cache.state.layers]
    assert len(decoder.looks) == len(numbers)
    for number, looks in zip(numbers, decoder.looks, strict=True):
        assert looks.tolist() == maps[number][0, :, -1].argmax(dim=-1).tolist()


def test_compressed_heads_look_at_what_they_hold() -> None:
    model = tiny("llama")
    cache = read(model, IDS, method("adakv", budget=48), page=16).cache
    where = positions(cache)
    decoder = Decoder(model, cache, [torch.zeros(1)])
    decoder.step(17)
    for heads, looks in zip(where, decoder.looks, strict=True):
        for head, place in enumerate(looks.tolist()):
            assert place in [*heads[head // 2].tolist(), len(IDS)]  # two query heads a KV head


def test_positions_are_those_kept() -> None:
    cache = read(tiny("llama"), IDS, method("streamingllm", budget=48), page=16).cache
    for heads in positions(cache):
        for found in heads:
            assert found.tolist() == [0, 1, 2, 3, *range(150 - 44, 150)]


def test_a_cache_that_read_alone_holds_its_live_tensors() -> None:
    for recipe in [method("full"), *RECIPES]:
        cache = read(tiny("llama"), IDS, recipe, page=16).cache
        assert held(cache).bytes == cache.report().bytes == live_bytes(cache.state)


def test_sharing_a_reading_changes_nothing_that_is_held() -> None:
    model = tiny("llama")
    shared = read(model, IDS, method("full"), page=16, observe=RECIPES).cache
    for recipe in [method("full"), method("snapkv", budget=400), *RECIPES]:
        alone = read(model, IDS, recipe, page=16).cache
        mine = shared.compressed(recipe)
        assert held(mine) == held(alone), recipe
        for ours, theirs in zip(positions(mine), positions(alone), strict=True):
            assert [a.tolist() for a in ours] == [b.tolist() for b in theirs]
        decoder = Decoder(model, mine, [shared.state.columns and torch.zeros(1)])
        for token in range(20):  # grows pools that are shared
            decoder.step(token)


def test_read_bytes_are_keys_and_values() -> None:
    cache = read(tiny("llama"), IDS, method("knorm", budget=48), page=16).cache
    assert held(cache).read_bytes == 2 * 2 * 48 * 2 * 16 * 4  # layers, heads, entries, key and value, dim, float32
    folded = read(tiny("llama"), IDS, method("snapkv", budget=48, merge="fold"), page=16).cache
    assert held(folded).read_bytes == 2 * 2 * 48 * (2 * 16 * 4 + 4)


def test_layers_of_transformers_own_are_read_too() -> None:
    cache = read(tiny("gemma3"), IDS, method("knorm", budget=48), page=16).cache
    report = cache.report()
    stock = sum(row.bytes for row in report.layers if "sliding" in row.note)
    assert stock > 0
    assert held(cache).read_bytes == stock + report.entries * 2 * 16 * 4
