"""Task-KV's specification, one test a line of "How to check an implementation"."""

from __future__ import annotations

import pytest
import torch
from tests.models import text, tiny
from tests.reading import deep, held, read
from tests.views import keep, kept, layer_view, view_rows

from kvthrift import OptionError, RecipeError, method
from kvthrift.allocate import SemanticHeads
from kvthrift.allocate.semantic import heterogeneous, middle_tokens
from kvthrift.core import LayerView


def test_heterogeneous_heads_fall_with_depth() -> None:
    found = [heterogeneous(32, r, 32, 0.25, 4) for r in range(32)]
    assert (found[0], found[31]) == (8, 4)
    assert sum(found) / 32 == pytest.approx(6, abs=0.1)
    assert found == sorted(found, reverse=True)
    assert heterogeneous(8, 0, 1, 0.3, 1) == 2


def test_middle_tokens_of_32_heads_at_40_percent() -> None:
    budget = 0.4 * 4096 * 32
    assert budget == pytest.approx(52428.8)
    k = middle_tokens(budget, 4096, 32, 8, 272)
    assert k == 547
    assert 32768 + 24 * (272 + k) == 52424 <= budget
    assert middle_tokens(4096 * 32, 4096, 32, 8, 272) == 4096 - 272  # all of it: nothing is left to choose
    assert middle_tokens(0.1 * 4096 * 32, 4096, 32, 8, 272) < 0  # whole heads alone take a quarter


def view_of(heads: int = 8, entries: int = 400, **options: int) -> LayerView:
    return layer_view(heads=heads, group=2, entries=entries, window=16, layers=8, **options)


SMALL = {"tokens": 64, "window": 16, "ends": 24}


def counts_of(view: LayerView, mean: int, **options: float) -> list[int]:
    part = SemanticHeads(**{**SMALL, **options})  # type: ignore[arg-type]
    return [int(n) for n in part.split(torch.zeros(view.valid.shape), torch.tensor([mean]), view)[0]]


def test_whole_heads_and_the_rest_use_the_budget_exactly() -> None:
    found = counts_of(view_of(), 200, beta=0.25, last=1.0)
    assert sorted(found)[-2:] == [400, 400]
    assert sum(found) == 8 * 200
    assert max(found[:-2]) - min(found) <= 400
    assert sorted(found)[:6] == [133, 133, 133, 133, 134, 134]


def test_distances_are_the_formula() -> None:
    view = view_of(heads=3, entries=90)
    column = view_rows(view).float().mean(dim=(2, 3))[0]  # [H, T]
    top = column.topk(64, dim=-1)
    pairs = enumerate(zip(*top, strict=True))
    vectors = torch.stack([(weight[:, None] * view.values[0, h][at]).sum(dim=0) for h, (weight, at) in pairs])
    wanted = (vectors - vectors.mean(dim=0)).norm(dim=-1)
    torch.testing.assert_close(SemanticHeads(**SMALL).distances(view)[0], wanted, rtol=1e-3, atol=1e-5)


def test_all_but_one_are_the_farthest_and_one_is_the_nearest() -> None:
    view = view_of()
    order = SemanticHeads(**SMALL).distances(view)[0].argsort(descending=True).tolist()
    found = counts_of(view, 300, beta=0.5, last=4.0)
    assert {h for h in range(8) if found[h] == 400} == {*order[:3], order[-1]}
    single = counts_of(view, 200, beta=0.1, last=1.0)
    assert [h for h in range(8) if single[h] == 400] == [order[0]]


def test_identical_heads_are_told_apart_by_number() -> None:
    view = view_of()
    view.keys, view.values = view.keys[:, :1].expand(-1, 8, -1, -1), view.values[:, :1].expand(-1, 8, -1, -1)
    assert view.queries is not None
    view.queries = view.queries[:, :2].repeat(1, 8, 1, 1)
    found = counts_of(view, 250, beta=0.375, last=3.0)
    assert [n == 400 for n in found] == [True] * 3 + [False] * 5
    assert sum(found) == 8 * 250


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_a_head_with_values_ten_times_as_large_is_whole_in_every_layer(layer: int) -> None:
    view = view_of(layer=layer)
    view.values[:, 5] *= 10
    assert counts_of(view, 200, beta=0.25, last=1.0)[5] == 400


def test_the_whole_budget_keeps_everything() -> None:
    assert counts_of(view_of(), 400) == [400] * 8
    cache = read(tiny("llama"), text(1, 90), method("task_kv", budget="100%"))
    assert held(cache) == [[list(range(90))] * 2] * 2


def test_without_room_between_it_is_streaming_heads() -> None:
    view = view_of(heads=4)
    recipe = method("task_kv", sinks=8, recent=16, window=16, beta=0.25)
    found = kept(recipe, view, (400 + 3 * 24) // 4)
    whole = [p for p in found if len(p) == 400]
    assert len(whole) == 1
    assert [p for p in found if len(p) < 400] == [[*range(8), *range(384, 400)]] * 3


def test_without_whole_heads_it_is_snapkv_beside_the_ends() -> None:
    view = view_of(heads=4)
    recipe = method("task_kv", sinks=8, recent=24, window=16, beta=0.0, last=0.0)
    snapkv = method("snapkv", window=16, pool="avg")
    score = snapkv.scorer.score(view)[0, :, 8:376]
    for h, positions in enumerate(kept(recipe, view, 60)):
        middle = sorted((score[h].topk(28).indices + 8).tolist())
        assert positions == [*range(8), *middle, *range(376, 400)]


@pytest.mark.parametrize("budget", [1, 30, 100, 271, 272, 273])
def test_budgets_below_both_ends_keep_sinks_and_the_newest(budget: int) -> None:
    view = view_of(heads=2)
    sinks = min(budget, 16)
    recent = min(budget - sinks, 256)
    for positions in kept(method("task_kv"), view, budget):
        assert {*range(sinks), *range(400 - recent, 400)} <= set(positions)
        assert len(positions) == budget


def test_whole_heads_that_do_not_fit_are_fewer() -> None:
    view = view_of()
    assert [n == 400 for n in counts_of(view, 100, beta=0.5, last=4.0)].count(True) == 1  # 800 of 400 f + 24 (8 - f)
    assert [n == 400 for n in counts_of(view, 60, beta=0.5, last=4.0)].count(True) == 0


def test_having_fewer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="kvthrift"):
        counts_of(view_of(), 300, beta=0.5, last=4.0)
        assert not caplog.messages
        counts_of(view_of(), 100, beta=0.5, last=4.0)
    assert caplog.messages == ["layer 0: room for 1 of 4 whole heads."]


def test_a_layer_of_a_model_uses_its_own_depth() -> None:
    recipe = method("task_kv", budget=150, beta=1.0, last=0.0, sinks=4, recent=16, window=16)
    found = held(read(deep(3), text(1, 280), recipe))
    assert [[len(p) for p in layer].count(280) for layer in found] == [1, 1, 0]  # of 2, 1 and 0 wanted
    assert [sum(map(len, layer)) for layer in found] == [300] * 3


def test_sequences_of_a_batch_split_for_themselves() -> None:
    view = view_of(batch=3)
    whole = keep(method("task_kv", sinks=4, recent=16), view, 150).sum(dim=-1) == 400
    assert len({tuple(row) for row in whole.tolist()}) > 1


def test_bad_input_is_refused() -> None:
    for options in ({"beta": 1.5}, {"last": -1}, {"tokens": 0}, {"recent": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            method("task_kv", **options)
    with pytest.raises(RecipeError, match="are no masses"):
        method("task_kv", merge="fold")
