"""Tokens and chunks: counts respected, protected entries kept, nothing but real entries, ties to the lowest index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view, top
from torch import Tensor

from kvthrift import OptionError
from kvthrift.core import LayerView
from kvthrift.select import ChunkUnit, TokenUnit


@st.composite
def cases(draw: st.DrawFn, *, uniform: bool = False) -> tuple[LayerView, Tensor, Tensor, Tensor]:
    """A ragged view, scores with ties, counts and protected entries that fit them."""
    heads = draw(st.integers(1, 3))
    longest = draw(st.integers(1, 40))
    lengths = [longest] * heads if uniform else [draw(st.integers(1, longest)) for _ in range(heads)]
    view = layer_view(heads=heads, lengths=[lengths], dim=2)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.rand(view.valid.shape, generator=rng).round(decimals=draw(st.sampled_from([0, 1, 6])))
    sinks, recent = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    steps = torch.arange(view.valid.shape[-1])
    protected = view.valid & ((steps < sinks) | view.tail(recent))
    least = protected.sum(dim=-1)[0].tolist()
    if uniform:
        counts = [draw(st.integers(max(*least, 1), longest))] * heads
    else:
        counts = [draw(st.integers(max(k, 1), n)) for k, n in zip(least, lengths, strict=True)]
    return view, scores, torch.tensor([counts]), protected


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_token_unit_keeps_exactly_its_count_and_the_best(
    case: tuple[LayerView, Tensor, Tensor, Tensor],
) -> None:
    view, scores, counts, protected = case
    keep = TokenUnit().select(scores, counts, protected, view)
    ranked = scores.masked_fill(protected, 10.0)
    for h in range(keep.shape[1]):
        best = top(ranked[0, h, : view.lengths[0, h]], int(counts[0, h]))
        assert set(keep[0, h].nonzero()[:, 0].tolist()) == best


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 12), st.sampled_from(["mean", "sum"]), st.booleans())
def test_chunks_respect_counts_and_protection_and_split_only_where_they_must(
    case: tuple[LayerView, Tensor, Tensor, Tensor], size: int, pooled: str, fill: bool
) -> None:
    view, scores, counts, protected = case
    keep = ChunkUnit(size, pooled, per_head=True, fill=fill).select(scores, counts, protected, view)  # type: ignore[arg-type]
    assert not (keep & ~view.valid).any()
    assert (keep | ~protected).all()
    assert (keep.sum(dim=-1) <= counts).all()
    for h in range(keep.shape[1]):
        free = (view.valid & ~protected)[0, h]
        room = int(counts[0, h] - protected[0, h].sum())
        taken = int((keep[0, h] & free).sum())
        there = int(free.sum())
        if fill or room < size:
            assert taken == min(room, there)
            continue
        members = [
            (int((keep[0, h] & free)[a : a + size].sum()), int(free[a : a + size].sum()))
            for a in range(0, len(free), size)
        ]
        assert all(got in (0, whole) for got, whole in members)  # a chunk stays or goes
        wanted = min(room // size, sum(whole > 0 for _, whole in members))
        assert sum(got > 0 for got, _ in members) == wanted


@settings(max_examples=80, deadline=None)
@given(cases(uniform=True), st.integers(1, 12), st.booleans())
def test_shared_chunks_are_the_same_in_all_heads(
    case: tuple[LayerView, Tensor, Tensor, Tensor], size: int, fill: bool
) -> None:
    view, scores, counts, protected = case
    keep = ChunkUnit(size, fill=fill).select(scores, counts, protected, view)
    room = counts - protected.sum(dim=-1)
    if not fill and (room >= size).all():
        assert (keep == keep[:, :1]).all()
    assert (keep.sum(dim=-1) <= counts).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_chunks_of_one_are_tokens(case: tuple[LayerView, Tensor, Tensor, Tensor]) -> None:
    view, scores, counts, protected = case
    tokens = TokenUnit().select(scores, counts, protected, view)
    for pooled in ("mean", "sum"):
        chunks = ChunkUnit(1, pooled, per_head=True).select(scores, counts, protected, view)  # type: ignore[arg-type]
        assert torch.equal(chunks, tokens)


def chosen(unit: ChunkUnit, scores: Tensor, count: int, window: int = 0) -> list[list[int]]:
    view = layer_view(heads=scores.shape[0], entries=scores.shape[1], dim=2)
    counts = torch.full((1, scores.shape[0]), count)
    keep = unit.select(scores[None], counts, view.tail(window), view)[0]
    return [row.nonzero()[:, 0].tolist() for row in keep]


def test_worked_example() -> None:
    """T = 40, c = 10, two chunks: sums 3, 0, 4, 0 keep 0..9 and 20..29."""
    scores = torch.zeros(1, 40)
    scores[0, 5], scores[0, 25], scores[0, 26] = 3, 2, 2
    for pooled in ("mean", "sum"):
        assert chosen(ChunkUnit(10, pooled), scores, 20) == [[*range(10), *range(20, 30)]]  # type: ignore[arg-type]
        assert chosen(ChunkUnit(10, pooled), scores, 10) == [[*range(20, 30)]]  # type: ignore[arg-type]


def test_uniform_scores_keep_the_lowest_chunks() -> None:
    assert chosen(ChunkUnit(10), torch.ones(3, 40), 20) == [[*range(20)]] * 3
    assert chosen(ChunkUnit(10, "sum"), torch.zeros(1, 40), 20) == [[*range(20)]]


def test_a_sum_handicaps_a_short_last_chunk_and_a_mean_favours_it() -> None:
    scores = torch.ones(1, 33)
    scores[0, 30:] = 2.0
    assert chosen(ChunkUnit(10, "sum"), scores, 10) == [[*range(10)]]
    assert chosen(ChunkUnit(10, "mean"), scores, 10) == [[30, 31, 32]]
    assert chosen(ChunkUnit(10, "mean", fill=True), scores, 10) == [[*range(7), 30, 31, 32]]


def test_one_choice_is_made_by_the_sum_over_heads_or_one_by_each() -> None:
    scores = torch.zeros(2, 30)
    scores[0, 0:10], scores[0, 20:30], scores[1, 10:20], scores[1, 20:30] = 3, 2, 3, 2
    assert chosen(ChunkUnit(10), scores, 10) == [[*range(20, 30)]] * 2
    assert chosen(ChunkUnit(10, per_head=True), scores, 10) == [[*range(10)], [*range(10, 20)]]


def test_the_window_takes_no_part_in_the_contest_of_chunks() -> None:
    scores = torch.zeros(1, 40)
    scores[0, 33:40] = 9.0  # in the window: it stays anyway and must not pull its chunk along
    scores[0, 12] = 1.0
    assert chosen(ChunkUnit(10, "sum"), scores, 17, window=7) == [[*range(10, 20), *range(33, 40)]]


def test_fill_takes_the_best_of_the_next_chunk() -> None:
    scores = torch.zeros(1, 40)
    scores[0, 5], scores[0, 13], scores[0, 18], scores[0, 30] = 9, 3, 3, 1
    assert chosen(ChunkUnit(10, fill=True), scores, 12) == [[*range(10), 13, 18]]
    assert chosen(ChunkUnit(10), scores, 12) == [[*range(10)]]


def test_a_budget_below_a_chunk_keeps_the_best_entries() -> None:
    scores = torch.zeros(1, 40)
    scores[0, 5], scores[0, 17], scores[0, 33] = 1, 2, 3
    assert chosen(ChunkUnit(10), scores, 2) == [[17, 33]]


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        ChunkUnit(0)
