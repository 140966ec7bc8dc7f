"""Scores from keys alone, order alone, and accumulated columns."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, with_signals

from kvthrift.score import AttentionReceived, KeyDifference, KeyNorm, Recency, Uninformed


def test_key_norm_is_minus_the_norm_before_and_after_rotation() -> None:
    view = with_signals(layer_view(entries=12))
    assert view.rope is not None
    plain = KeyNorm().score(view)
    torch.testing.assert_close(plain, -(view.keys**2).sum(dim=-1).sqrt())
    view.keys = view.rope.rotate(view.keys, view.positions)
    torch.testing.assert_close(KeyNorm().score(view), plain, atol=1e-5, rtol=1e-5)


def test_key_difference_is_minus_the_cosine_to_the_mean_direction_of_what_is_there() -> None:
    view = layer_view(lengths=[[7, 15]])
    score = KeyDifference().score(view)
    for h, n in ((0, 7), (1, 15)):
        keys = view.keys[0, h, :n].double()
        anchor = sum(k / k.norm() for k in keys) / n
        wanted = [-float(k @ anchor / k.norm() / anchor.norm()) for k in keys]
        assert score[0, h, :n].tolist() == pytest.approx(wanted, abs=1e-5)


def test_recency_orders_by_true_position() -> None:
    view = layer_view(entries=12, seen=60)
    assert (Recency().score(view).diff(dim=-1) > 0).all()


def test_a_random_score_belongs_to_the_token_and_not_to_what_else_is_there() -> None:
    view = layer_view(entries=200)
    score = Uninformed().score(view)
    some = torch.arange(0, 200, 3)
    fewer = layer_view(entries=len(some))
    fewer.positions = view.positions[..., some]
    assert torch.equal(Uninformed().score(fewer), score[..., some])


def test_random_scores_differ_by_seed_layer_and_head_and_are_spread_evenly() -> None:
    view = layer_view(heads=2, entries=4000, dim=2)
    score = Uninformed().score(view)
    other_layer = Uninformed().score(layer_view(heads=2, entries=4000, dim=2, layer=1))
    for other in (Uninformed(1).score(view)[0, 0], other_layer[0, 0], score[0, 1]):
        assert abs(torch.corrcoef(torch.stack((score[0, 0], other)))[0, 1]) < 0.06
    assert score.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.histc(score, 10, 0, 1).min() > 600
    assert score.min() >= 0
    assert score.max() < 1


def test_columns_are_summed_or_averaged_over_the_queries_that_saw_them() -> None:
    view = layer_view(entries=10, seen=25)
    view.columns = torch.rand(1, 2, 10)
    assert torch.equal(AttentionReceived().score(view), view.columns)
    rows = AttentionReceived("rows").score(view)
    for h in range(2):
        for n in range(10):
            saw = 25 - int(view.positions[0, h, n])
            assert float(rows[0, h, n]) == pytest.approx(float(view.columns[0, h, n]) / saw)
