"""Newer forms with parts of other papers: pairs that no paper has, held to what every recipe promises."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import DELIMITERS, fitted
from tests.live import live_bytes
from tests.models import text, tiny
from tests.reading import held

from kvthrift import Budget, Cache, Protect, Recipe, Trigger, method, prefill
from kvthrift.allocate import (
    CompositeLayers,
    EntropyLayers,
    GroupHeads,
    LossStop,
    PageLayers,
    PoolLayers,
    PreferenceLayers,
    PyramidLayers,
    SemanticHeads,
    TableLayers,
    ThresholdHeads,
    ThresholdLayers,
    WholeHeads,
)
from kvthrift.merge import MassFold
from kvthrift.score import (
    AttentionPower,
    AttentionReceived,
    ExpectedAttention,
    KeyDifference,
    LinearSurrogate,
    PositionBias,
    SecondPassAttention,
    SegmentGuided,
    WindowAttention,
)
from kvthrift.select import ChunkUnit, OutputAware, SegmentBlocks

N, BUDGET, PAGE = 160, 48, 16
RECENT = Protect(recent=8)
PLUS = SecondPassAttention(60, relative=True)
PROBE = SecondPassAttention(0, "all", group="mean", instructed=False, probe=tuple(range(3, 40)))
BIAS = PositionBias(WindowAttention(8), (0, 40), tuple(tuple((0.02 * n, 0.01 * h) for h in range(2)) for n in range(2)))
FORETOLD = LinearSurrogate()

EXACT = {
    "KVzip+ in whole heads": Recipe("a", PLUS, heads=WholeHeads(protected=8), protect=RECENT),
    "KVzip+, a pyramid, segment blocks": Recipe(
        "b", PLUS, layers=PyramidLayers(), unit=SegmentBlocks(), protect=RECENT
    ),
    "KVzip+ of the whole model, folded": Recipe(
        "c", PLUS, layers=PoolLayers(), merge=MassFold(), protect=Protect(4, 4)
    ),
    "KVzip+, head groups, output-aware": Recipe(
        "d", PLUS, heads=GroupHeads(protected=8), refine=OutputAware(), protect=RECENT
    ),
    "a probe's composites in semantic heads": Recipe(
        "e", PROBE, layers=CompositeLayers(), heads=SemanticHeads(tokens=32, window=16, ends=8), protect=RECENT
    ),
    "a probe in chunks over entropy layers": Recipe(
        "f", PROBE, layers=EntropyLayers(), unit=ChunkUnit(4, per_head=True, fill=True), protect=RECENT
    ),
    "biased windows, layer errors, whole heads": Recipe(
        "g", BIAS, layers=TableLayers(), heads=WholeHeads(protected=8, within="layer"), protect=RECENT
    ),
    "biased windows over segments": Recipe("h", BIAS, unit=SegmentBlocks(), protect=RECENT),
    "whole heads, filled by segments of what is expected": Recipe(
        "i", SegmentGuided(ExpectedAttention()), heads=WholeHeads(protected=8), unit=SegmentBlocks(), protect=RECENT
    ),
    "foretold scores, layers weighed as they come, head groups": Recipe(
        "j", FORETOLD, layers=PreferenceLayers(8), heads=GroupHeads(protected=8), protect=RECENT
    ),
    "foretold scores in chunks, folded": Recipe(
        "k", FORETOLD, unit=ChunkUnit(6, fill=True), merge=MassFold(), protect=RECENT
    ),
    "whole heads of key differences, in 8 bits": Recipe(
        "l", KeyDifference(), heads=WholeHeads(protected=8), protect=RECENT, codec=method("snapkv", codec="int8").codec
    ),
}

FREE = {  # a budget is the most they keep
    "a threshold on squares, folded": Recipe(
        "m", AttentionPower(), layers=ThresholdLayers(-3), heads=ThresholdHeads(-3), merge=MassFold(), protect=RECENT
    ),
    "a threshold on KVzip+ for segment blocks": Recipe(
        "n", PLUS, layers=ThresholdLayers(-3), heads=ThresholdHeads(-3), unit=SegmentBlocks(), protect=RECENT
    ),
    "a threshold's room in head groups": Recipe(
        "o", AttentionReceived(), layers=ThresholdLayers(-1), heads=GroupHeads(protected=8), protect=RECENT
    ),
    "a stop rule over foretold scores, semantic heads": Recipe(
        "p", FORETOLD, layers=LossStop(0.1), heads=SemanticHeads(tokens=32, window=16, ends=8), protect=Protect(4, 1)
    ),
    "even pages of KVzip+": Recipe("q", PLUS, layers=PageLayers(8, even="layers"), protect=RECENT),
    "even pages of biased windows": Recipe("r", BIAS, layers=PageLayers(8, even="heads", ranked=50), protect=RECENT),
}
DECIDES = [name for name, recipe in FREE.items() if recipe.layers.decides]
ALL = {**EXACT, **FREE}
DECODED = [n for n, x in ALL.items() if not x.needs.second_pass and not x.needs.segments]  # both are of a prompt


def made(name: str, budget: int | str | None = BUDGET, **changes: object) -> Recipe:
    found = ALL[name].with_options(**changes)
    if isinstance(found.scorer, LinearSurrogate):
        found = fitted(found)
    elif isinstance(found.layers, TableLayers):
        found = found.with_options(layers=TableLayers((1.0, 2.0), 8))
    return found if budget is None else found.with_options(budget=Budget.parse(budget))


def read(recipe: Recipe, batch: int = 2, **options: object) -> Cache:
    ids = text(2, N)[:batch]
    return prefill(tiny("llama"), ids, recipe, page=PAGE, delimiters=DELIMITERS, **options)  # type: ignore[arg-type]


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 12


@pytest.mark.parametrize("name", ALL)
def test_the_budget_is_held_and_every_page_accounted_for(name: str) -> None:
    cache = read(made(name))
    cache.check_integrity()
    report, protect = cache.report(), ALL[name].protect
    assert report.bytes == live_bytes(cache)
    assert report.entries < report.full_entries
    assert report.entries == BUDGET * 8 if name in EXACT else report.entries <= BUDGET * 8
    for layer in held(cache):
        for places in layer:
            assert places == sorted(set(places))
            assert set(range(protect.sinks)) | set(range(N - protect.recent, N)) <= set(places)


@pytest.mark.parametrize("name", DECIDES)
def test_without_a_budget_it_is_found_and_a_limit_only_takes_away(name: str) -> None:
    free = read(made(name, None)).report()
    assert 0 < free.entries < free.full_entries
    assert "as much as is needed" in free.recipe
    assert read(made(name, 30)).report().entries <= min(30 * 8, free.entries)


@pytest.mark.parametrize("name", EXACT)
def test_bytes_in_all_are_a_limit(name: str) -> None:
    size = 30_000 if ALL[name].codec is not None else 60_000
    report = read(made(name, f"{size}B"), batch=1).report()
    assert report.entries < report.full_entries
    assert report.bytes <= size + 2000  # tables and lengths


@pytest.mark.parametrize("name", [name for name in ALL if name not in DECIDES])
def test_room_for_everything_changes_no_token(name: str) -> None:
    model, ids = tiny("llama"), text(2, N)
    recipe = made(name, N, codec=None)
    caches = [read(recipe), prefill(model, ids)]
    assert caches[0].report().entries == caches[0].report().full_entries
    with torch.inference_mode():
        for n in range(4):
            ours, whole = (model(input_ids=ids[:, n : n + 1], past_key_values=c).logits for c in caches)
            assert torch.equal(ours, whole)


@pytest.mark.parametrize("name", ALL)
def test_a_sequence_keeps_in_a_batch_what_it_keeps_alone(name: str) -> None:
    both, alone = read(made(name)), read(made(name), batch=1)
    assert held(both) == held(alone)


@pytest.mark.parametrize("name", ALL)
def test_a_shared_reading_keeps_the_same(name: str) -> None:
    recipe = made(name)
    assert held(read(method("full"), observe=[recipe]).compressed(recipe)) == held(read(recipe))


@pytest.mark.parametrize("name", DECODED)
def test_decoding_goes_on_within_the_budget(name: str) -> None:
    cache, model = read(made(name, trigger=Trigger(every=4))), tiny("llama")
    with torch.inference_mode():
        for step in range(12):
            model(input_ids=text(2, 1, seed=step), past_key_values=cache)
            assert cache.report().entries <= (BUDGET + 4) * 8
    cache.check_integrity()


@pytest.mark.parametrize("name", ALL)
def test_a_combination_can_be_written_down(name: str) -> None:
    recipe = made(name)
    assert Recipe.from_plain(recipe.plain()) == recipe
