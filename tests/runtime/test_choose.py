"""One compression of one layer: which entries stay, in which order, and what the layers owe each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view, plain_rope
from torch import Tensor

from kvthrift import BudgetError, Protect, Recipe
from kvthrift.allocate import AdaptiveHeads, HeadAllocator, TableHeads, UniformHeads
from kvthrift.core import LayerView
from kvthrift.merge import MassFold
from kvthrift.runtime.compress import Kept, check_floor, choose, foretell, gather, layer_totals, protected_entries
from kvthrift.score import AttentionReceived, Recency
from kvthrift.select import ChunkUnit, TokenUnit

ANY = Recipe("any", Recency())


@st.composite
def layers(draw: st.DrawFn) -> tuple[LayerView, Tensor]:
    """A ragged layer and scores with ties."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = [[draw(st.integers(1, 30)) for _ in range(heads)] for _ in range(batch)]
    view = layer_view(batch=batch, heads=heads, lengths=lengths, seen=draw(st.integers(1, 60)), dim=2)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return view, torch.rand(view.valid.shape, generator=rng).round(decimals=draw(st.sampled_from([1, 6])))


heads = st.sampled_from([UniformHeads(), AdaptiveHeads(), AdaptiveHeads(0.0), AdaptiveHeads(blend=0.5)])
units = st.sampled_from([TokenUnit(), ChunkUnit(4, per_head=True), ChunkUnit(4, per_head=True, fill=True)])


def held(view: LayerView, kept: Kept) -> LayerView:
    """The view of what stayed."""
    lengths = torch.from_numpy(kept.lengths)
    real = torch.arange(int(lengths.max())) < lengths[..., None]
    keys = torch.zeros(*real.shape, view.keys.shape[-1])
    values, positions = torch.zeros_like(keys), torch.zeros(real.shape, dtype=torch.long)
    keys[real], values[real], positions[real] = kept.keys, kept.values, kept.positions
    return replace(view, keys=keys, values=values, positions=positions, lengths=lengths, _valid=None)


@settings(max_examples=150, deadline=None)
@given(layers(), heads, units, st.integers(0, 4), st.integers(0, 4), st.integers(0, 12))
def test_protected_entries_stay_nothing_false_does_and_the_layer_keeps_its_total(
    layer: tuple[LayerView, Tensor],
    split: HeadAllocator,
    unit: TokenUnit | ChunkUnit,
    sinks: int,
    recent: int,
    more: int,
) -> None:
    view, scores = layer
    recipe = ANY.with_options(heads=split, unit=unit, protect=Protect(sinks, recent))
    per_head = max(sinks + recent + more, 1)
    keep = choose(recipe, view, scores, torch.full((len(view.seen),), per_head))
    protected = protected_entries(recipe, view)
    assert not (keep & ~view.valid).any()
    assert not (protected & ~keep).any()
    assert (keep.sum(dim=-1) >= 1).all()
    room = torch.minimum(torch.tensor(per_head * scores.shape[1]), view.lengths.sum(dim=1))
    total = keep.sum(dim=(1, 2))
    if isinstance(unit, TokenUnit) and not split.uniform:
        assert (total <= torch.maximum(room, protected.sum(dim=(1, 2)))).all()
        assert (total >= room).all()
    elif isinstance(unit, TokenUnit):
        wanted = torch.minimum(view.lengths, torch.tensor(per_head)).maximum(protected.sum(dim=-1))
        assert torch.equal(keep.sum(dim=-1), wanted)
    else:
        assert (total <= torch.maximum(room, protected.sum(dim=(1, 2)))).all()


@settings(max_examples=300, deadline=None)
@given(layers(), heads, st.integers(0, 4), st.integers(0, 4), st.integers(-2, 12), st.booleans(), st.booleans())
def test_what_is_foretold_comes_true(
    layer: tuple[LayerView, Tensor], split: HeadAllocator, sinks: int, recent: int, more: int, whole: bool, nan: bool
) -> None:
    view, scores = layer
    scores = scores.masked_fill(scores > 0.7, float("nan")) if nan else scores
    recipe = ANY.with_options(heads=split, protect=Protect(sinks, recent))
    per_head = np.full(len(view.seen), max(sinks + recent + more, 1))
    stays = np.array([whole, *[False] * (len(per_head) - 1)])
    view.known_lengths = view.lengths.numpy()
    foretold = foretell(recipe, view, per_head, stays)
    keep = choose(recipe, view, scores, torch.from_numpy(per_head))
    keep = torch.where(torch.from_numpy(stays)[:, None, None], view.valid, keep)
    if foretold is None:
        assert more < 0 or (isinstance(split, AdaptiveHeads) and split.blend is not None)
        return
    assert int(keep.sum()) == foretold.total or (nan and foretold.lengths is None)  # the store refuses those
    if foretold.lengths is None:
        assert isinstance(split, AdaptiveHeads)
        return
    assert torch.equal(keep.sum(dim=-1), torch.from_numpy(foretold.lengths))
    assert torch.equal(choose(recipe, view, scores, torch.from_numpy(per_head), foretold.lengths), keep)


def test_a_table_that_gives_a_head_next_to_nothing_does_not_take_its_window() -> None:
    recipe = ANY.with_options(heads=TableHeads(((0.0, 1.0),), beta=1.0), protect=Protect(recent=10))
    view = layer_view(entries=60, layers=1)
    keep = choose(recipe, view, torch.rand(1, 2, 60), torch.tensor([12]))
    assert keep.sum(dim=-1).tolist() == [[10, 24]]
    assert keep[..., -10:].all()


@settings(max_examples=60, deadline=None)
@given(layers(), heads, units)
def test_a_budget_no_head_exceeds_keeps_everything(
    layer: tuple[LayerView, Tensor], split: HeadAllocator, unit: TokenUnit | ChunkUnit
) -> None:
    view, scores = layer
    recipe = ANY.with_options(heads=split, unit=unit)
    assert torch.equal(choose(recipe, view, scores, view.lengths.amax(dim=1)), view.valid)


@settings(max_examples=120, deadline=None)
@given(layers(), st.sampled_from([UniformHeads(), AdaptiveHeads(), AdaptiveHeads(0.0)]), st.data())
def test_cutting_in_two_steps_is_cutting_at_once(
    layer: tuple[LayerView, Tensor], split: HeadAllocator, data: st.DataObject
) -> None:
    """What the cascade of layer budgets rests on: kept sets only shrink."""
    view, scores = layer
    if not split.uniform:  # which of two equal scores in different heads goes first depends on where they stand
        order = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(scores.numel()))
        scores = (order / scores.numel()).view(scores.shape)
    recipe = ANY.with_options(heads=split, protect=Protect(recent=2))
    last = data.draw(st.integers(2, 29))
    first = torch.full((len(view.seen),), data.draw(st.integers(last, 30)))
    at_once = choose(recipe, view, scores, torch.full_like(first, last))
    half = gather(recipe, view, choose(recipe, view, scores, first), None, {"score": scores})
    smaller = held(view, half)
    stored = torch.zeros(smaller.valid.shape)
    stored[smaller.valid] = half.planes["score"]
    twice = gather(recipe, smaller, choose(recipe, smaller, stored, torch.full_like(first, last)), None, {})
    direct = gather(recipe, view, at_once, None, {})
    assert np.array_equal(twice.lengths, direct.lengths)
    assert torch.equal(twice.positions, direct.positions)


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 999))
def test_what_stays_is_laid_out_by_sequence_head_and_position_and_rows_belong_together(
    layer: tuple[LayerView, Tensor], seed: int
) -> None:
    view, scores = layer
    keep = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.5) & view.valid
    kept = gather(ANY, view, keep, scores, {"score": scores})
    assert np.array_equal(kept.lengths, keep.sum(dim=-1).numpy())
    at = 0
    for b, h in np.ndindex(*kept.lengths.shape):
        stop = at + int(kept.lengths[b, h])
        positions = kept.positions[at:stop]
        assert (positions.diff() > 0).all()
        for row, position in zip(range(at, stop), positions.tolist(), strict=True):
            place = view.positions[b, h, : view.lengths[b, h]].tolist().index(position)
            assert torch.equal(kept.keys[row], view.keys[b, h, place])
            assert torch.equal(kept.values[row], view.values[b, h, place])
            assert kept.planes["score"][row] == scores[b, h, place]
        at = stop
    assert at == len(kept.keys)


def test_folding_happens_on_the_way_out_and_leaves_a_bias() -> None:
    recipe = Recipe("mine", AttentionReceived(), merge=MassFold())
    view = layer_view(entries=12)
    scores, keep = torch.rand(1, 2, 12), torch.zeros(1, 2, 12, dtype=torch.bool)
    keep[..., ::3] = True
    kept = gather(recipe, view, keep, scores, {"bias": torch.zeros(1, 2, 12)})
    assert (kept.planes["bias"] > 0).any()
    assert not torch.equal(kept.values, view.values[keep])
    whole = gather(recipe, view, view.valid, scores, {"bias": torch.zeros(1, 2, 12)})
    assert torch.equal(whole.values, view.values[view.valid])  # to the bit: nothing was folded


def test_re_rotated_keys_are_those_computed_at_positions_without_gaps() -> None:
    raw, rope = torch.randn(1, 2, 20, 8), plain_rope(8)
    recipe = ANY.with_options(rerotate=True)
    view = layer_view(entries=20)
    view.rope, view.keys = rope, rope.rotate(raw, view.positions)
    keep = torch.zeros(1, 2, 20, dtype=torch.bool)
    keep[0, 0, [0, 1, 7, 12, 18, 19]] = True
    keep[0, 1, [2, 3, 4, 5, 11, 12, 13, 19]] = True
    kept = gather(recipe, view, keep, None, {})
    fresh = [rope.rotate(raw[0, h][keep[0, h]], torch.arange(20 - n, 20)) for h, n in ((0, 6), (1, 8))]
    torch.testing.assert_close(kept.keys, torch.cat(fresh), atol=1e-5, rtol=1e-5)
    assert kept.positions[:6].tolist() == [0, 1, 7, 12, 18, 19]  # true positions are remembered all the same

    smaller = held(view, kept)  # and once more, over heads of different lengths
    again = torch.zeros_like(smaller.valid)
    again[0, 0, [0, 2, 5]] = True
    again[0, 1, [1, 2, 3, 6]] = True
    twice = gather(recipe, smaller, again, None, {})
    fresh = [
        rope.rotate(raw[0, 0, [0, 7, 19]], torch.arange(17, 20)),
        rope.rotate(raw[0, 1, [3, 4, 5, 13]], torch.arange(16, 20)),
    ]
    torch.testing.assert_close(twice.keys, torch.cat(fresh), atol=1e-5, rtol=1e-5)


def test_a_query_meets_re_rotated_keys_as_if_the_text_had_no_gap() -> None:
    raw, rope, query = torch.randn(1, 1, 20, 8), plain_rope(8), torch.randn(1, 1, 1, 8)
    view = layer_view(heads=1, entries=20)
    view.rope, view.keys = rope, rope.rotate(raw, view.positions)
    keep = torch.zeros(1, 1, 20, dtype=torch.bool)
    keep[..., [0, 3, 4, 18, 19]] = True
    kept = gather(ANY.with_options(rerotate=True), view, keep, None, {})
    met = rope.rotate(query, torch.tensor([[[20]]]))[0, 0] @ kept.keys.T
    slots = rope.rotate(query, torch.tensor([[[5]]]))[0, 0] @ rope.rotate(raw[keep], torch.arange(5)).T
    torch.testing.assert_close(met, slots, atol=1e-4, rtol=1e-4)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(0, 8), st.integers(1, 40), st.integers(0, 6), st.data())
def test_layers_weighed_so_far_share_the_room_of_all_and_no_more(
    weighed: int, protected: int, more: int, later: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0, 100), min_size=weighed, max_size=weighed))
    caps = data.draw(st.lists(st.integers(1, 80), min_size=weighed, max_size=weighed))
    budget, count = protected + more, weighed + later
    totals = layer_totals(
        [torch.tensor([w]) for w in weights],
        torch.tensor([budget]),
        protected,
        [np.array([cap]) for cap in caps],
        count,
    )
    found = [int(t[0]) for t in totals]
    assert all(min(cap, protected) <= n <= cap for n, cap in zip(found, caps, strict=True))
    assert sum(found) <= budget * count
    if not later and min(caps) >= protected:
        assert sum(found) == min(budget * count, sum(caps))


def test_a_budget_below_what_is_protected_is_refused_with_both_numbers() -> None:
    recipe = Recipe("mine", Recency(), protect=Protect(4, 32))
    check_floor(recipe, torch.tensor([36]))
    with pytest.raises(BudgetError, match="gives 35 entries a head, but mine always keeps 4 sinks and 32 recent"):
        check_floor(recipe, torch.tensor([100, 35]))
