"""Thresholds: entries that score enough stay, however many; a budget only ever takes more away."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view

from kvthrift import OptionError, Protect, Recipe
from kvthrift.allocate import ThresholdHeads, ThresholdLayers, UniformHeads
from kvthrift.runtime.compress import choose, protected_entries
from kvthrift.score import Recency

LENGTHS = [[40, 7, 33], [12, 40, 1]]


def stays(
    scores: torch.Tensor,
    log_score: float,
    limit: int | None = None,
    recent: int = 0,
    lengths: list[list[int]] = LENGTHS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays ``[B, H, T]``, and what is real."""
    view = layer_view(batch=2, heads=3, lengths=lengths)
    heads, over = ThresholdHeads(log_score), ThresholdLayers(log_score)
    recipe = Recipe("x", Recency(), layers=over, heads=heads, protect=Protect(recent=recent))
    room = over.stop(view, scores, protected_entries(recipe, view))
    room = room if limit is None else room.clamp(max=limit)
    return choose(recipe, view, scores, room.clamp(min=recent)), view.valid


def draw(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(seed)) ** 4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(-12, 0.5), st.integers(0, 9))
def test_what_scores_enough_stays_with_the_recent_and_the_best_of_each_head(seed: int, tau: float, recent: int) -> None:
    scores = draw(seed)
    found, valid = stays(scores, tau, recent=recent)
    for b in range(2):
        for h in range(3):
            n = LENGTHS[b][h]
            row = scores[b, h, :n].tolist()
            wanted = {i for i in range(n) if row[i] > 0 and math.log(row[i]) >= tau} | set(range(max(n - recent, 0), n))
            wanted = wanted or {row.index(max(row))}
            assert set(found[b, h].nonzero()[:, 0].tolist()) == wanted
    assert not (found & ~valid).any()


def test_no_threshold_keeps_everything_and_one_that_none_reaches_an_entry_a_head() -> None:
    found, valid = stays(draw(0), -math.inf)
    assert torch.equal(found, valid)
    found, _ = stays(draw(0), math.inf)
    assert found.sum(dim=-1).tolist() == [[1] * 3] * 2


def test_more_is_kept_the_lower_it_is() -> None:
    counts = [int(stays(draw(1), tau)[0].sum()) for tau in (-20, -6, -3, -1, -0.1)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 5


def test_small_scores_are_told_apart() -> None:
    scores = torch.tensor([1e-30, 1e-29]).expand(2, 3, 2).contiguous()
    found, _ = stays(scores, math.log(5e-30), lengths=[[2] * 3] * 2)
    assert found.tolist() == [[[False, True]] * 3] * 2


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_a_limit_leaves_the_highest_scores_of_the_layer(limit: int) -> None:
    scores = draw(2)
    free, valid = stays(scores, -4)
    found, _ = stays(scores, -4, limit)
    for b in range(2):
        room = min(limit * 3, int(free[b].sum()))
        assert int(found[b].sum()) == room
        assert not (found[b] & ~valid[b]).any()
        best = scores[b].masked_fill(~valid[b], -1).argmax(dim=-1)
        kept, gone = found[b].clone(), valid[b] & ~found[b]
        kept[torch.arange(3), best] = False  # every head keeps one
        if kept.any():
            assert scores[b][kept].min() >= scores[b][gone].max()


def test_other_heads_share_the_room_that_was_found() -> None:
    view, scores = layer_view(batch=2, heads=3, lengths=[[40] * 3] * 2), draw(3)
    recipe = Recipe("x", Recency(), layers=ThresholdLayers(-2), heads=UniformHeads())
    room = recipe.layers.stop(view, scores, protected_entries(recipe, view))
    enough = (scores.log() >= -2).sum(dim=-1).clamp(min=1)
    assert room.tolist() == [math.ceil(int(row.sum()) / 3) for row in enough]
    assert choose(recipe, view, scores, room).sum(dim=-1).tolist() == [[n] * 3 for n in room.tolist()]


def test_what_is_no_number_is_refused() -> None:
    for part in (ThresholdHeads, ThresholdLayers):
        with pytest.raises(OptionError, match="log_score=nan must be a number"):
            part(math.nan)
