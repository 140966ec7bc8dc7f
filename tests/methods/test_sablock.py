"""SABlock's specification, one test a line of "How to check an implementation"; and its slow twin."""

from __future__ import annotations

import math

import pytest
import torch
from tests.models import text, tiny
from tests.reading import held
from tests.views import keep, layer_view
from torch import Tensor

from kvthrift import OptionError, method, prefill
from kvthrift.core import LayerView
from kvthrift.score import AttentionReceived, KeyNorm, SegmentGuided, WindowAttention
from kvthrift.score.segment import segment_weights
from kvthrift.select import SegmentBlocks
from kvthrift.select.segment import SIZES, Blocks

W = 8


def segmented(view: LayerView, every: int = 0, seed: int = 0) -> LayerView:
    """The view with segments of ``every`` tokens, or of random lengths."""
    b, tokens = view.keys.shape[0], int(view.seen.max())
    if every:
        numbers = (torch.arange(tokens) // every).expand(b, tokens)
    else:
        rng = torch.Generator().manual_seed(seed)
        numbers = (torch.rand(b, tokens, generator=rng) < 0.08).long().cumsum(dim=1)
    view.segments = numbers
    return view


def one_head(scores: list[float]) -> tuple[Tensor, LayerView]:
    """A single segment of these scores, and one token of another behind it, so that the text is not one segment."""
    view = layer_view(heads=1, entries=len(scores) + 1)
    view.segments = torch.tensor([[0] * len(scores) + [1]])
    return torch.tensor([[[*scores, 0.0]]]), view


def search(scores: Tensor, view: LayerView, counts: Tensor, unit: SegmentBlocks, tail: int = 0) -> Blocks:
    return unit.search(scores, counts, view.tail(tail), view)


def chosen(scores: list[float], quota: int, tau: float = 0.85) -> tuple[list[int], int]:
    given, view = one_head(scores)
    found = search(given, view, torch.tensor([[quota]]), SegmentBlocks(tau))
    return found.keep[0, 0].nonzero()[:, 0].tolist(), int(found.sizes[0, 0, 0])


def test_the_first_example_falls_back_to_single_tokens() -> None:
    assert chosen([5, 0, 0, 4, 3, 0], 3) == ([0, 3, 4], 1)


def test_the_second_example_takes_blocks_of_two_and_of_three_below_80_percent() -> None:
    assert chosen([5, 4, 1, 0, 3, 0], 3) == ([0, 1, 4], 2)
    assert chosen([5, 4, 1, 0, 3, 0], 3, tau=0.8) == ([0, 1, 2], 3)


def slow(scores: list[float], quota: int, tau: float, best: list[int]) -> tuple[set[int], int]:
    """One segment's choice, written out."""
    target = sum(scores[n] for n in best)
    for size in SIZES:
        if size > quota:
            continue
        blocks = [list(range(a, min(a + size, len(scores)))) for a in range(0, len(scores), size)]
        blocks.sort(key=lambda block: (-sum(scores[n] for n in block), block[0]))
        inside = [n for block in blocks[: -(-quota // size)] for n in block]
        taken = sorted(inside, key=lambda n: (-scores[n], n))[:quota]
        if size == 1 or sum(scores[n] for n in taken) / target >= tau:
            spare = sorted((n for n in best if n not in taken), key=lambda n: (-scores[n], n))
            return {*taken, *spare[: quota - len(taken)]}, size
    raise AssertionError


@pytest.mark.parametrize("tau", [0.0, 0.6, 0.85, 0.95, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_batched_search_is_the_slow_one(tau: float, seed: int) -> None:
    view = segmented(layer_view(batch=2, heads=3, entries=200, seed=seed), seed=seed)
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 200, generator=rng) ** 3
    scores = (scores * 8).round() / 8 if seed == 3 else scores  # ties
    counts = torch.tensor([[60, 17, 9], [120, 191, 60]])
    found = search(scores, view, counts, SegmentBlocks(tau), tail=W)
    assert view.segments is not None
    for b in range(2):
        for h in range(3):
            row = scores[b, h].tolist()
            past = range(200 - W)
            best = sorted(past, key=lambda n: (-row[n], n))[: int(counts[b, h]) - W]
            wanted: set[int] = set()
            for k in range(int(view.segments[b].max()) + 1):
                tokens = [n for n in past if int(view.segments[b, n]) == k]
                inside = [n for n in best if n in set(tokens)]
                assert int(found.quotas[b, h, k]) == len(inside)
                if not inside:
                    assert int(found.sizes[b, h, k]) == 0
                    continue
                begin = tokens[0]
                if sum(row[n] for n in inside) == 0:
                    continue
                kept, size = slow([row[n] for n in tokens], len(inside), tau, [n - begin for n in inside])
                assert int(found.sizes[b, h, k]) == size
                wanted |= {n + begin for n in kept}
            assert set(found.keep[b, h].nonzero()[:, 0].tolist()) >= wanted
            assert int(found.keep[b, h].sum()) == int(counts[b, h]) - W


def test_without_a_demand_every_segment_takes_the_largest_size() -> None:
    view = segmented(layer_view(heads=4, entries=240), every=40)
    scores = torch.rand(1, 4, 240, generator=torch.Generator().manual_seed(0))
    found = search(scores, view, torch.full((1, 4), 70), SegmentBlocks(0.0))
    for size, quota in zip(found.sizes.flatten().tolist(), found.quotas.flatten().tolist(), strict=True):
        assert size == max((b for b in SIZES if b <= quota), default=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_demand_that_cannot_be_met_keeps_single_tokens(seed: int) -> None:
    view = segmented(layer_view(heads=3, group=2, entries=160, window=W, seed=seed), seed=seed)
    guided = method("sablock", tau=1.5)
    plain = guided.with_options(unit=method("snapkv").unit)
    assert torch.equal(keep(guided, view, 50), keep(plain, view, 50))
    assert not torch.equal(keep(method("sablock", tau=0.5), view, 50), keep(plain, view, 50))


def test_without_guidance_and_blocks_it_is_snapkv() -> None:
    view = segmented(layer_view(heads=3, group=2, entries=160, window=W))
    snapkv = keep(method("snapkv", window=W), view, 50)
    assert torch.equal(keep(method("sablock", alpha=0.0, tau=1.5), view, 50), snapkv)
    assert not torch.equal(keep(method("sablock", alpha=50.0, tau=1.5), view, 50), snapkv)


@pytest.mark.parametrize("budget", [9, 20, 64, 159])
def test_counts_and_quotas_are_exact_and_kept_tokens_lie_in_whole_blocks(budget: int) -> None:
    view = segmented(layer_view(heads=3, group=2, entries=160, window=W), every=16)
    recipe = method("sablock")
    scores = recipe.scorer.score(view)
    found = search(scores, view, torch.full((1, 3), budget), SegmentBlocks(), tail=W)
    assert found.keep.sum(dim=-1).tolist() == [[budget - W] * 3]
    assert view.segments is not None
    for h in range(3):
        kept = found.keep[0, h]
        for k in range(10):
            inside = kept[k * 16 : (k + 1) * 16].nonzero()[:, 0].tolist()
            size, quota = int(found.sizes[0, h, k]), int(found.quotas[0, h, k])
            assert len(inside) == quota
            if size and 16 % size == 0 and k < 9:  # no short block: nothing is filled
                assert len({n // size for n in inside}) <= -(-quota // size)


def test_importance_and_spread_are_the_formulas() -> None:
    view = segmented(layer_view(heads=2, group=2, entries=50, window=W), every=7)
    importance, spread = segment_weights(view, W)
    assert view.queries is not None
    q = view.queries[0, :, -1].double()
    keys = view.keys[0].double().repeat_interleave(2, dim=0)
    a = (torch.einsum("hd,htd->ht", q, keys) * view.scale).softmax(dim=-1)
    p = a / a.sum(dim=0)
    entropy = -(p * p.log()).sum(dim=0)
    for k in range(6):
        tokens = slice(7 * k, min(7 * k + 7, 50 - W))
        assert float(importance[0, k]) == pytest.approx(float(a[:, tokens].sum(dim=0).mean()), rel=1e-4)
        assert float(spread[0, k]) == pytest.approx(float(entropy[tokens].mean()), rel=1e-4)
    weight = importance * (1 + 2.0 * spread)
    score = SegmentGuided(WindowAttention(W, "sum"), alpha=0.5, eta=2.0).score(view)
    base = WindowAttention(W, "sum").score(view)
    torch.testing.assert_close(score, base * (1 + 0.5 * weight[0, torch.arange(50) // 7]))


def test_spread_is_ln_of_the_heads_when_all_attend_alike_and_0_when_one_holds_all() -> None:
    view = segmented(layer_view(heads=4, group=1, entries=60, window=W), every=10)
    assert view.queries is not None
    view.keys, view.queries = view.keys[:, :1].expand(-1, 4, -1, -1), view.queries[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(segment_weights(view, W)[1][0, :5], torch.full((5,), math.log(4)), rtol=1e-4, atol=1e-4)
    alone = segmented(layer_view(heads=4, group=1, entries=60, window=W), every=10)
    assert alone.queries is not None
    alone.keys[:, 1:, :50] = -100.0 * alone.queries[:, 1:, -1:]  # three heads never look into the past
    assert float(segment_weights(alone, W)[1][0, :5].max()) == pytest.approx(0.0, abs=1e-3)


def test_a_text_without_a_delimiter_keeps_the_best_single_tokens() -> None:
    view = layer_view(heads=3, group=2, entries=160, window=W)
    view.segments = torch.zeros(1, 161, dtype=torch.int32)
    assert torch.equal(keep(method("sablock"), view, 50), keep(method("snapkv", window=W), view, 50))


def test_room_for_everything_keeps_everything() -> None:
    cache = prefill(tiny("llama"), text(1, 90), "sablock", budget=90, delimiters=range(20))
    assert held(cache) == [[list(range(90))] * 2] * 2


def test_pyramid_falls_from_bottom_to_top() -> None:
    cache = prefill(tiny("llama"), text(1, 300), "sablock", budget=60, pyramid=True, delimiters=range(20))
    lengths = [len(layer[0]) for layer in held(cache)]
    assert sum(lengths) == 120
    assert lengths[0] > lengths[1]


def test_scores_that_may_be_negative() -> None:
    with pytest.raises(OptionError, match="may be negative"):
        SegmentGuided(KeyNorm())
    SegmentGuided(AttentionReceived())
    view = segmented(layer_view(heads=2, entries=100), every=9)
    recipe = method("knorm").with_options(unit=SegmentBlocks())
    assert keep(recipe, view, 33).sum(dim=-1).tolist() == [[33, 33]]


@pytest.mark.parametrize("options", [{"blocks": "5/3"}, {"blocks": "1/2"}, {"blocks": "x"}, {"tau": -1}, {"alpha": -1}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        method("sablock", **options)
