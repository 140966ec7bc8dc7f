"""The anchor scorers' specification, one test a line of "How to check an implementation"."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import fitted
from tests.models import text, tiny
from tests.reading import read
from tests.views import keep, kept, layer_view, moments, plain_rope, with_signals

from kvthrift import Recipe, method, methods
from kvthrift.allocate import TableHeads
from kvthrift.core import LayerView
from kvthrift.kernels import window_attention

T = 48


def recipe_for_tiny(name: str, budget: int | str) -> Recipe:
    recipe = method(name, budget=None if name == "full" else budget)
    return fitted(recipe)  # tables for the tiny model's 2 layers of 2 heads


@pytest.mark.parametrize("budget", [T, "100%"])
@pytest.mark.parametrize("name", methods())
def test_any_scorer_with_n_keep_of_T_gives_the_full_caches_logits_exactly(name: str, budget: int | str) -> None:
    model, ids = tiny("llama"), text(1, T + 3)
    caches = [read(model, ids[:, :T], recipe) for recipe in (recipe_for_tiny(name, budget), method("full"))]
    with torch.inference_mode():
        for n in range(T, T + 3):
            ours, whole = (model(input_ids=ids[:, n : n + 1], past_key_values=c).logits for c in caches)
            assert torch.equal(ours, whole)


def with_keys(rows: list[list[float]]) -> LayerView:
    keys = torch.tensor(rows)[None, None]
    view = layer_view(heads=1, entries=len(rows), dim=len(rows[0]))
    view.keys = keys
    return view


def test_streamingllm_T_10_ratio_40_percent_sinks_2() -> None:
    recipe = method("streamingllm", sinks=2, budget="60%")
    assert recipe.budget is not None
    count = recipe.budget.entries(10, heads=1, entry_bytes=1, page=64)
    assert kept(recipe, layer_view(heads=3, entries=10), count) == [[0, 1, 6, 7, 8, 9]] * 3


def test_knorm_of_norms_3_1_2_keeping_2() -> None:
    assert kept(method("knorm"), with_keys([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]), 2) == [[1, 2]]


def test_keydiff_keeps_the_key_unlike_the_others() -> None:
    assert kept(method("keydiff"), with_keys([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 1) == [[2]]


@pytest.mark.parametrize("budget", [1, 7, 20])
def test_tova_index_sets_are_equal_across_heads(budget: int) -> None:
    view = layer_view(heads=4, group=2, entries=50, window=1)
    found = kept(method("tova"), view, budget)
    assert found == [found[0]] * 4
    assert found[0][-1] == 49
    assert len(found[0]) == budget
    rows = window_attention(
        view.queries,  # type: ignore[arg-type]
        view.keys,
        q_positions=view.query_positions,  # type: ignore[arg-type]
        k_positions=view.positions,
        valid=view.valid,
        scale=view.scale,
    )
    best = rows.mean(dim=(1, 2))[0, 0, :49].topk(budget - 1).indices.tolist()
    assert found[0][:-1] == sorted(best)


def spread_out(view: LayerView) -> LayerView:
    """Heads of very unequal sharpness, so that they would like very unequal budgets."""
    view.keys *= torch.tensor([0.1, 1.0, 3.0, 9.0])[None, :, None, None]
    return view


def test_adakv_sum_of_head_counts_and_safeguard() -> None:
    view = spread_out(layer_view(heads=4, group=2, entries=300, window=32))
    counts = keep(method("adakv"), view, 60).sum(dim=-1)[0].tolist()
    assert sum(counts) == 4 * 60
    assert min(counts) >= max(60 // 5, 32)
    assert max(counts) - min(counts) > 40  # heads do compete


def test_adakv_of_identical_heads_gives_equal_counts() -> None:
    view = layer_view(heads=4, group=2, entries=300, window=32)
    view.keys[:] = view.keys[:, :1]
    assert view.queries is not None
    view.queries[:] = view.queries[:, :1]
    assert keep(method("adakv"), view, 60).sum(dim=-1)[0].tolist() == [60] * 4


@pytest.mark.parametrize("base", ["snapkv", "h2o", "expected_attention"])
def test_adakv_with_alpha_of_one_is_the_base_scorer(base: str) -> None:
    view = with_signals(spread_out(layer_view(heads=4, group=2, entries=300, window=32)))
    ours, theirs = keep(method("adakv", base=base, safeguard=1.0), view, 60), keep(method(base), view, 60)
    assert torch.equal(ours, theirs)
    assert not torch.equal(keep(method("adakv", base=base), view, 60), theirs)


def test_expected_attention_of_one_query_is_that_querys_choice() -> None:
    rope, query = plain_rope(8), torch.randn(1, 4, 1, 8)
    view = layer_view(heads=4, entries=60)
    view.rope, view.moments = rope, moments(query)
    attention = rope.rotate(query, torch.tensor([[[60]]])) @ view.keys.transpose(-1, -2) * view.scale
    attention[..., :4] = -torch.inf
    worth = attention.softmax(dim=-1)[:, :, 0] * view.values.norm(dim=-1)
    found = kept(method("expected_attention", future=1), view, 14)
    for h in range(4):
        assert found[h] == [0, 1, 2, 3, *sorted(worth[0, h].topk(10).indices.tolist())]


def test_headkv_with_constant_importance_returns_the_budget_everywhere() -> None:
    recipe = method("snapkv").with_options(heads=TableHeads(((0.7,) * 4,) * 4, beta=1.005, protected=32))
    for layer in range(4):
        view = layer_view(heads=4, entries=300, window=32, layer=layer)
        assert keep(recipe, view, 61).sum(dim=-1)[0].tolist() == [61] * 4
        assert torch.equal(keep(recipe, view, 61), keep(method("snapkv"), view, 61))


@pytest.mark.parametrize("base", ["snapkv", "h2o", "adakv"])
def test_criticalkv_with_equal_L1_images_is_the_base(base: str) -> None:
    view = with_signals(spread_out(layer_view(heads=4, group=2, entries=300, window=32)))
    ours = method("criticalkv", base=base)
    assert not torch.equal(keep(ours, view, 60), keep(method(base), view, 60))
    view.values = torch.ones_like(view.values)
    assert torch.equal(keep(ours, view, 60), keep(method(base), view, 60))


def test_criticalkv_over_adakv_takes_head_budgets_from_the_base_scores() -> None:
    view = with_signals(spread_out(layer_view(heads=4, group=2, entries=300, window=32)))
    ours, theirs = keep(method("criticalkv", base="adakv"), view, 60), keep(method("adakv"), view, 60)
    assert torch.equal(ours.sum(dim=-1), theirs.sum(dim=-1))
    over = keep(method("adakv", base="criticalkv"), view, 60)
    assert torch.equal(ours, over)


def test_criticalkv_turns_its_value_norm_off_over_expected_attention() -> None:
    assert not method("criticalkv", base="expected_attention").needs.output_weight
    assert method("criticalkv", base="snapkv").needs.output_weight


def test_lagkv_with_a_constant_second_partition_drops_by_share_and_not_by_nan() -> None:
    view = layer_view(entries=4 + 4 * 16)
    view.keys[:, :, 20:36], view.values[:, :, 20:36] = 1.5, 0.0
    found = kept(method("lagkv", lag=16), view, 4 + 16 + 3 * 8)
    for positions in found:
        assert positions[:4] == [0, 1, 2, 3]
        assert positions[-16:] == list(range(52, 68))
        for start in (4, 20, 36):  # every partition before the last loses half
            assert sum(start <= p < start + 16 for p in positions) == 8


@pytest.mark.parametrize("prompt", [20, 263])
def test_observed_attention_sums_to_the_number_of_queries(prompt: int) -> None:
    model, ids = tiny("llama"), text(1, prompt)
    cache = read(model, ids, method("h2o", budget=prompt, recent=0))
    for layer in cache.state.layers:
        assert layer.store is not None
        sums = layer.store.plane("columns").sum(dim=-1)
        torch.testing.assert_close(sums, torch.full((1, 2), float(prompt)), atol=1e-2, rtol=1e-4)


def test_h2o_keeps_the_heaviest_and_the_newest() -> None:
    view = with_signals(layer_view(heads=2, entries=60))
    assert view.columns is not None
    found = kept(method("h2o", recent=10), view, 20)
    for h in range(2):
        heavy = view.columns[0, h, :50].topk(10).indices.tolist()
        assert found[h] == [*sorted(heavy), *range(50, 60)]


def test_snapkv_forces_the_window_and_keeps_its_top_of_the_rest() -> None:
    view = layer_view(heads=2, group=2, entries=100, window=16)
    recipe = method("snapkv", window=16)
    score = recipe.scorer.score(view)
    found = kept(recipe, view, 30)
    for h in range(2):
        best = score[0, h, :84].sort(descending=True, stable=True).indices[:14]
        assert found[h] == [*sorted(best.tolist()), *range(84, 100)]


def test_random_eviction_is_the_same_every_time_and_shrinks_to_subsets() -> None:
    view = layer_view(heads=2, entries=100)
    recipe = method("random", seed=3)
    more, fewer = keep(recipe, view, 60), keep(recipe, view, 50)
    assert torch.equal(more, keep(recipe, view, 60))
    assert (more | ~fewer).all()
    assert not torch.equal(more, keep(method("random", seed=4), view, 60))
