"""DBudgetKV's specification, one test a line of "How to check an implementation"; its trend is measured elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import text
from tests.reading import deep, held
from tests.views import layer_view
from torch import Tensor

from kvthrift import Cache, Protect, Recipe, method, prefill
from kvthrift.allocate import LossStop
from kvthrift.core import LayerView
from kvthrift.runtime.compress import choose, protected_entries
from kvthrift.score import Recency, WindowAttention

WORKED = [[0.5, 0.05, 0.05, 0.1, 0.3], [0.4, 0.0, 0.1, 0.2, 0.3]]
N = 120


def looking(rows: Tensor, kv_heads: int = 2) -> LayerView:
    """A layer whose last query attends with ``rows [HG, T]``, up to a factor a head."""
    heads, entries = rows.shape
    logs = rows.double().clamp(min=1e-300).log().float().clamp(min=-300)  # exp of it is 0
    view = layer_view(heads=kv_heads, group=heads // kv_heads, entries=entries, dim=heads)
    view.scale = 1.0
    view.keys = logs.T.expand(1, kv_heads, entries, heads).contiguous()
    view.queries = torch.eye(heads)[None, :, None]
    view.query_positions = torch.tensor([[entries - 1]])
    return view


def stays(view: LayerView, loss: float, sinks: int = 1, **changes: object) -> list[list[int]]:
    recipe = Recipe("mine", Recency(), layers=LossStop(loss, sinks), protect=Protect(sinks)).with_options(**changes)
    scores = recipe.scorer.score(view).float()
    count = recipe.layers.stop(view, scores, protected_entries(recipe, view))
    keep = choose(recipe, view, scores, count)[0]
    return [view.positions[0, h][keep[h]].tolist() for h in range(keep.shape[0])]


def test_the_worked_example() -> None:
    rows = torch.tensor(WORKED)[None, :, None].double()
    found = LossStop.losses(rows.masked_fill(torch.arange(5) < 1, 0.0)[..., 1:])[0]
    torch.testing.assert_close(found, torch.tensor([0, 0.0056, 0.0307, 0.1407]).double(), atol=5e-5, rtol=0)
    view = looking(torch.tensor(WORKED))
    assert stays(view, 0.01) == [[0, 2, 3, 4]] * 2
    assert stays(view, 0.05) == [[0, 3, 4]] * 2


def test_at_0_only_leading_tokens_that_no_head_looks_at_go_and_at_1_all_but_sinks_and_the_last() -> None:
    rows = torch.tensor([[0.5, 0, 0, 0.1, 0, 0.4], [0.2, 0, 0, 0.0, 0.5, 0.3]])
    assert stays(looking(rows), 0.0) == [[0, 3, 4, 5]] * 2
    for loss in (1.0, 7.0):
        assert stays(looking(rows), loss) == [[0, 5]] * 2
        assert stays(looking(rows), loss, sinks=3) == [[0, 1, 2, 5]] * 2


def random_rows(seed: int, heads: int = 4, entries: int = 60) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(heads, entries, generator=rng)).softmax(dim=-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_losses_never_fall_and_more_loss_keeps_fewer(seed: int, one: float, other: float) -> None:
    rows = random_rows(seed)
    losses = LossStop.losses(rows[None, :, None].double())[0]
    assert (losses.diff() >= -1e-12).all()
    low, high = sorted((one, other))
    assert len(stays(looking(rows), low)[0]) >= len(stays(looking(rows), high)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 0.5))
def test_the_count_is_the_slow_ones_and_all_heads_hold_the_same(seed: int, loss: float) -> None:
    rows, sinks = random_rows(seed), 4
    n = rows.shape[1]

    def norm(j: int) -> float:
        kept = rows[:, sinks + j :].double()
        return sum(math.sqrt(float(row.square().sum())) for row in kept) / len(kept)

    losses = [(norm(0) - norm(j)) / norm(0) for j in range(n - sinks)]
    best = max(j for j, found in enumerate(losses) if found <= loss)
    if min(abs(found - loss) for found in losses) > 1e-6:  # no tie with the arithmetic
        wanted = [*range(sinks), *range(sinks + best, n)]
        assert len(wanted) == sinks + (n - sinks - best)
        assert stays(looking(rows), loss, sinks) == [wanted] * 2


@pytest.mark.parametrize("share", [0.04, 0.9])
def test_scaling_what_is_not_sink_changes_nothing(share: float) -> None:
    for seed in range(10):
        rows = random_rows(seed)
        rows, other = (
            torch.cat((rows[:, :1] * 0 + 1 - x, x * rows[:, 1:] / rows[:, 1:].sum(dim=-1, keepdim=True)), dim=1)
            for x in (0.3, share)
        )
        assert stays(looking(rows), 0.05) == stays(looking(other), 0.05)


def test_no_more_than_the_sinks_stays_whole() -> None:
    assert stays(looking(random_rows(0, entries=3)), 0.5, sinks=4) == [[0, 1, 2]] * 2


def test_by_attention_heads_choose_for_themselves_and_drop_as_many() -> None:
    view = layer_view(heads=2, group=2, entries=80, window=8)
    scorer = WindowAttention(8, queries="sum", pool="none")
    found = stays(view, 0.05, 4, scorer=scorer, protect=Protect(4, 8))
    assert len(found[0]) == len(found[1]) < 80
    assert found[0] != found[1]
    assert all(places[:4] == [0, 1, 2, 3] and places[-8:] == list(range(72, 80)) for places in found)


# -- in a model ----------------------------------------------------------------------------------------------------


def test_without_a_budget_the_report_says_what_was_taken() -> None:
    model, ids = deep(4), text(2, N)
    context = prefill(model, ids, "dbudgetkv", loss=0.1)
    report = context.report()
    assert [row.note != "" for row in report.layers] == [True, True, False, False]
    assert [row.mean for row in report.layers[:2]] == [N, N]
    assert all(4 < row.mean < N for row in report.layers[2:])
    assert report.kept == pytest.approx(sum(row.mean for row in report.layers) / 4 / N)
    assert "as much as is needed" in report.recipe
    for layer in held(context)[2:]:
        assert layer[0] == layer[1] == [*range(4), *range(N - len(layer[0]) + 4, N)]
    context.check_integrity()
    tighter = prefill(model, ids, "dbudgetkv", loss=0.3).report()
    assert tighter.entries < report.entries


def test_rows_of_a_batch_find_their_own() -> None:
    model, ids = deep(4), text(3, N)
    together = prefill(model, ids, "dbudgetkv", loss=0.1)
    for b in range(3):
        alone = prefill(model, ids[b : b + 1], "dbudgetkv", loss=0.1)
        for ours, theirs in zip(together.state.layers, alone.state.layers, strict=True):
            assert ours.store is not None
            assert theirs.store is not None
            assert ours.store.lengths[b].tolist() == theirs.store.lengths[0].tolist()


def test_a_budget_is_an_upper_limit() -> None:
    model, ids = deep(4), text(1, N)
    free = prefill(model, ids, "dbudgetkv", loss=0.1, skip=()).report()
    capped = prefill(model, ids, "dbudgetkv", loss=0.1, skip=(), budget=50).report()
    assert [row.most for row in capped.layers] == [min(row.most, 50) for row in free.layers]
    fits = prefill(model, ids, "dbudgetkv", loss=0.1, skip=(), budget=N).report()
    assert fits.entries == fits.full_entries


def test_it_works_inside_a_plain_generate_and_shares_a_reading() -> None:
    model, ids = deep(4), text(1, N)
    past = Cache(model.config, "dbudgetkv", loss=0.1)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=1)
    context = prefill(model, ids, "dbudgetkv", loss=0.1)
    assert held(past) == held(context)
    assert held(prefill(model, ids, observe=["dbudgetkv"]).compressed("dbudgetkv", loss=0.1)) == held(context)


def test_loss_0_changes_no_token() -> None:
    model, ids = deep(3), text(1, N)
    made = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=8, do_sample=False
        ).tolist()
        for past in (Cache(model.config, method("dbudgetkv", loss=0.0)), Cache(model.config))
    ]
    assert made[0] == made[1]
