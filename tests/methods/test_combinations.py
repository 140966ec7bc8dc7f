"""Parts of different papers in one recipe: budgets are met, pages are conserved, and a large budget changes nothing."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import DELIMITERS, fitted
from tests.models import text, tiny
from tests.reading import held

from kvthrift import Budget, Cache, Protect, Recipe, generate, method, prefill
from kvthrift.allocate import (
    AdaptiveHeads,
    EntropyLayers,
    GroupHeads,
    PreferenceLayers,
    PyramidLayers,
    SemanticHeads,
    TableLayers,
)
from kvthrift.merge import MassFold
from kvthrift.score import (
    AttentionReceived,
    ChosenHeads,
    EndsFirst,
    ExpectedAttention,
    KeyDifference,
    LagRelative,
    SegmentGuided,
    WindowAttention,
)
from kvthrift.select import ChunkUnit, OutputAware, SegmentBlocks

PROMPT, BUDGET = 220, 48
RECENT = Protect(recent=8)
STAGES = TableLayers((4096.0, 1536.0), least=0)
GROUPS = GroupHeads(protected=8)

COMBINED = {
    "segments, retrieval heads, adaptive heads": Recipe(
        "x", SegmentGuided(ChosenHeads()), heads=AdaptiveHeads(), unit=SegmentBlocks(), protect=RECENT
    ),
    "layer groups over key differences": Recipe("x", KeyDifference(), layers=STAGES, heads=GROUPS, protect=RECENT),
    "semantic heads over accumulated attention": Recipe(
        "x", AttentionReceived(), heads=SemanticHeads(tokens=32, window=16, ends=8), protect=RECENT
    ),
    "segments in semantic heads of a pyramid": Recipe(
        "x",
        EndsFirst(WindowAttention(16), 4, 8),
        layers=PyramidLayers(),
        heads=SemanticHeads(tokens=32, window=16, ends=12),
        unit=SegmentBlocks(),
    ),
    "head groups, layer errors, output-aware": Recipe(
        "x", WindowAttention(8), layers=TableLayers(), heads=GROUPS, refine=OutputAware(), protect=RECENT
    ),
    "segment blocks by what is expected, folded": Recipe(
        "x", SegmentGuided(ExpectedAttention()), unit=SegmentBlocks(), merge=MassFold(), protect=RECENT
    ),
    "layers weighed as they come, segments": Recipe(
        "x", SegmentGuided(WindowAttention(8)), layers=PreferenceLayers(8), unit=SegmentBlocks(), protect=RECENT
    ),
    "entropy layers, head groups, segments": Recipe(
        "x", ChosenHeads(), layers=EntropyLayers(), heads=GROUPS, unit=SegmentBlocks(0.6), protect=RECENT
    ),
    "chunks by retrieval heads, layers in pairs": Recipe(
        "x", ChosenHeads(), unit=ChunkUnit(6, fill=True), protect=RECENT, reuse=2
    ),
    "segments of what lags": Recipe(
        "x", LagRelative(lag=32), heads=SemanticHeads(tokens=32, window=16, ends=8), unit=SegmentBlocks()
    ),
}


def combined(name: str, budget: int | str) -> Recipe:
    return fitted(COMBINED[name].with_options(budget=Budget.parse(budget)))


@pytest.mark.parametrize("name", COMBINED)
def test_the_budget_is_met_exactly(name: str) -> None:
    cache = prefill(tiny("llama"), text(2, PROMPT), combined(name, BUDGET), page=16, delimiters=DELIMITERS)
    cache.check_integrity()
    report = cache.report()
    assert report.entries == BUDGET * 2 * 2 * 2
    for layer in held(cache):
        for head in layer:
            assert head == sorted(set(head))
            if COMBINED[name].protect.recent:
                assert head[-8:] == list(range(PROMPT - 8, PROMPT))


@pytest.mark.parametrize("name", COMBINED)
def test_bytes_held_are_within_a_budget_of_bytes(name: str) -> None:
    page, size = 16, 40_000
    cache = prefill(tiny("llama"), text(1, PROMPT), combined(name, f"{size}B"), page=page, delimiters=DELIMITERS)
    cache.check_integrity()
    report = cache.report()
    entry = report.full_bytes / (PROMPT * 4) + 4 + 4 * len(cache.state.layers[0].store.pool.planes)  # type: ignore[union-attr]
    assert report.entries * entry <= size
    assert report.bytes <= size + 2000  # tables and lengths
    assert report.entries < report.full_entries


@pytest.mark.parametrize("name", COMBINED)
def test_room_for_everything_leaves_the_same_tokens(name: str) -> None:
    model, ids = tiny("llama"), text(1, PROMPT)
    ours = Cache(model.config, combined(name, PROMPT + 20))
    found = generate(model, ids, ours, delimiters=DELIMITERS, max_new_tokens=16, do_sample=False)
    plain = generate(model, ids, Cache(model.config), max_new_tokens=16, do_sample=False)
    assert torch.equal(found, plain)
    assert ours.report().entries == ours.report().full_entries


@pytest.mark.parametrize("name", COMBINED)
def test_a_combination_can_be_written_down(name: str) -> None:
    assert Recipe.from_plain(COMBINED[name].plain()) == COMBINED[name]


def test_methods_wrap_the_new_ones() -> None:
    over = fitted(method("adakv", base="compresskv", budget=BUDGET))
    cache = prefill(tiny("llama"), text(1, PROMPT), over)
    assert cache.report().entries == BUDGET * 4
    critical = fitted(method("criticalkv", base="sablock", budget=BUDGET))
    cache = prefill(tiny("llama"), text(1, PROMPT), critical, delimiters=DELIMITERS)
    assert cache.report().entries == BUDGET * 4
