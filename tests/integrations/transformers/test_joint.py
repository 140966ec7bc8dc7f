"""New parts with old ones: pairs that no paper has, held to what every recipe promises."""

from __future__ import annotations

import pytest
import torch
from tests.live import live_bytes
from tests.models import text, tiny
from tests.reading import held, read

from kvthrift import Budget, Cache, Protect, Recipe, RecipeError, Trigger, prefill
from kvthrift.allocate import (
    AdaptiveHeads,
    CompositeLayers,
    EntropyLayers,
    LossStop,
    PageLayers,
    PoolLayers,
    PyramidLayers,
)
from kvthrift.merge import MassFold
from kvthrift.score import AttentionPower, AttentionReceived, KeyNorm, SecondPassAttention, WindowAttention
from kvthrift.select import ChunkUnit, OutputAware

N, BUDGET, PAGE = 150, 48, 16
SECOND = SecondPassAttention(60)

PAIRS = {
    "second pass, chunks, AdaKV": Recipe(
        "a", SECOND, heads=AdaptiveHeads(0.2), unit=ChunkUnit(8, per_head=True), protect=Protect(4, 8)
    ),
    "second pass, entropy layers, AdaKV": Recipe("b", SECOND, layers=EntropyLayers(), heads=AdaptiveHeads(0.2)),
    "second pass, pages": Recipe("c", SECOND, layers=PageLayers(8), protect=Protect(2, 4)),
    "second pass, pyramid, folded": Recipe("d", SECOND, layers=PyramidLayers(), merge=MassFold()),
    "second pass, a stop rule": Recipe("e", SECOND, layers=LossStop(0.3), protect=Protect(4, 1)),
    "window, pool": Recipe("f", WindowAttention(8), layers=PoolLayers(), protect=Protect(recent=8)),
    "window, composite, AdaKV": Recipe(
        "g", WindowAttention(8), layers=CompositeLayers(), heads=AdaptiveHeads(0.2), protect=Protect(recent=8)
    ),
    "columns, pool, output-aware": Recipe(
        "h", AttentionReceived(), layers=PoolLayers(), refine=OutputAware(), protect=Protect(4, 8)
    ),
    "squares, AdaKV, chunks": Recipe(
        "i", AttentionPower(), heads=AdaptiveHeads(), unit=ChunkUnit(4, per_head=True), protect=Protect(recent=8)
    ),
    "keys, pages": Recipe("j", KeyNorm(), layers=PageLayers(16)),
    "columns, composite, folded": Recipe("k", AttentionReceived(), layers=CompositeLayers(), merge=MassFold()),
}
DECIDES = ("second pass, a stop rule",)
CHUNKED = ("second pass, chunks, AdaKV", "squares, AdaKV, chunks")


@pytest.mark.parametrize("model", ["llama", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_budget_is_held_and_every_page_accounted_for(model: str, pair: str) -> None:
    recipe = PAIRS[pair].with_options(budget=Budget.parse(BUDGET))
    past = prefill(tiny(model), text(2, N), recipe, page=PAGE)
    past.check_integrity()
    report = past.report()
    cut = [row for row in report.layers if not row.note]
    heads = sum(row.heads for row in cut) * 2
    spare = 8 if pair in CHUNKED or "pages" in pair else BUDGET - 1 if pair in DECIDES else 1
    assert (BUDGET - spare) * heads <= report.entries <= BUDGET * heads
    assert all(row.fewest >= 1 for row in cut)
    assert report.bytes == live_bytes(past)
    per_entry = report.full_bytes / N / 2 / sum(row.heads for row in report.layers)
    if model != "gemma3":
        assert report.bytes <= 1.4 * (report.entries + heads * PAGE) * per_entry
    protect = recipe.protect
    for layer in held(past):
        for places in layer:
            assert places == sorted(set(places))
            if len(places) < N and model != "gemma3":
                assert set(range(protect.sinks)) | set(range(N - protect.recent, N)) <= set(places)


@pytest.mark.parametrize("pair", PAIRS)
def test_budget_of_the_length_changes_no_token(pair: str) -> None:
    model, ids = tiny("llama"), text(1, N)
    caches = [prefill(model, ids, PAIRS[pair].with_options(budget=Budget.parse(N))), prefill(model, ids)]
    assert caches[0].report().entries == caches[0].report().full_entries
    with torch.inference_mode():
        for n in range(4):
            ours, whole = (model(input_ids=ids[:, n : n + 1], past_key_values=c).logits for c in caches)
            assert torch.equal(ours, whole)


@pytest.mark.parametrize("pair", PAIRS)
def test_bytes_in_all_are_a_limit(pair: str) -> None:
    model, ids = tiny("gpt_neox"), text(1, 400)
    budget = Budget.parse("200KiB")
    past = prefill(model, ids, PAIRS[pair].with_options(budget=budget), page=PAGE)
    report = past.report()
    assert report.entries < report.full_entries
    lost = 3 * 4 * PAGE * report.full_bytes / 400 / 12  # a page a head, where heads differ
    assert report.bytes <= budget.amount + 1.3 * lost


@pytest.mark.parametrize("pair", [name for name in PAIRS if not name.startswith("second")])
def test_one_pass_a_shared_reading_and_chunks_agree_on_what_they_may(pair: str) -> None:
    model, ids = tiny("llama"), text(1, N)
    recipe = PAIRS[pair].with_options(budget=Budget.parse(BUDGET))
    alone = read(model, ids, recipe)
    assert held(alone) == held(prefill(model, ids, recipe))
    assert held(alone) == held(prefill(model, ids, observe=[recipe]).compressed(recipe))
    chunked = prefill(model, ids, recipe, chunk=40)
    assert chunked.report().entries <= BUDGET * 4
    again = Cache(model.config, recipe)
    with torch.inference_mode():
        for turn in (ids[:, :70], ids[:, 70:]):  # a second turn is compressed with the first
            model(input_ids=turn, past_key_values=again)
    assert again.report().entries <= BUDGET * 4
    again.check_integrity()


@pytest.mark.parametrize("pair", ["window, pool", "window, composite, AdaKV", "keys, pages", "squares, AdaKV, chunks"])
def test_all_layers_are_compressed_together_while_decoding(pair: str) -> None:
    model = tiny("llama")
    past = Cache(model.config, PAIRS[pair].with_options(budget=Budget.parse(BUDGET), trigger=Trigger(every=4)))
    with torch.inference_mode():
        model(input_ids=text(2, N), past_key_values=past)
        before = past.report().compressions
        for step in range(16):
            model(input_ids=text(2, 1, seed=step), past_key_values=past)
            assert past.report().entries <= (BUDGET + 4) * 8
    assert past.report().compressions > before
    past.check_integrity()


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match="gives every head its own budget"):
        Recipe("x", KeyNorm(), layers=PoolLayers(), heads=AdaptiveHeads())
    with pytest.raises(RecipeError, match="gives every head its own budget"):
        Recipe("x", KeyNorm(), layers=PageLayers(), unit=ChunkUnit(4))
    with pytest.raises(RecipeError, match="reuse=2"):
        Recipe("x", KeyNorm(), layers=CompositeLayers(), reuse=2)
    with pytest.raises(RecipeError, match="when no output projection is at hand"):
        Cache(
            tiny("llama").config,
            Recipe("x", KeyNorm(), Budget.parse(9), PoolLayers(), refine=OutputAware(), trigger=Trigger(every=4)),
        )
