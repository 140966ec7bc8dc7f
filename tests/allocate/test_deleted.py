"""Heads that are given up: they keep the window, others share the rest, and the most similar stands in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view

from kvthrift import OptionError, RecipeError, method
from kvthrift.allocate import DeletedHeads, GroupHeads
from kvthrift.allocate.deleted import stand_ins
from kvthrift.integrations.transformers.stand_ins import taken_over
from kvthrift.integrations.vllm.settings import refuse

W = 8


def test_the_most_similar_of_those_that_are_left_stands_in() -> None:
    east, north, both = torch.eye(2)[0], torch.eye(2)[1], torch.tensor([3.0, 1.0])
    keys = torch.stack((both, north, east, 5 * north + east))[None, :, None]  # [1, 4, 1, 2]
    gone = torch.tensor([[True, False, False, True]])
    assert stand_ins(keys, gone).tolist() == [[2, 1, 2, 1]]
    assert stand_ins(keys, torch.tensor([[True, False, True, True]])).tolist() == [[1, 1, 1, 1]]
    assert stand_ins(keys, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[0, 1, 2, 3]]
    assert stand_ins(torch.ones(1, 3, 5, 2), torch.tensor([[False, False, True]])).tolist() == [[0, 1, 0]]  # ties


def test_outputs_are_taken_over_by_query_heads() -> None:
    out = torch.arange(6.0)[None, :, None, None].expand(2, 6, 3, 1)
    found = taken_over(out, torch.tensor([[0, 0, 2], [2, 1, 2]]))
    assert found[:, :, 1, 0].tolist() == [[0, 1, 0, 1, 4, 5], [4, 5, 2, 3, 4, 5]]
    assert taken_over(out, None) is out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(8, 70))
def test_those_given_up_keep_the_window_and_the_total_is_exact(seed: int, mean: int) -> None:
    rng = np.random.default_rng(seed)
    labels = tuple(int(x) for x in rng.integers(0, 3, 6))
    part = DeletedHeads((labels,), (9.0, 1.0, 3.0), W)
    view = layer_view(heads=6, entries=60, layers=1)
    found = part.split(torch.zeros(1, 6, 60), torch.tensor([mean]), view)[0].tolist()
    gone = part.given_up(0, 6)
    assert sum(found) == min(6 * mean, 6 * 60) or max(found) == 60
    assert gone == [label == 0 and any(labels) for label in labels]
    if mean < 60:
        assert all(n == W for n, away in zip(found, gone, strict=True) if away)
        kept = [n for n, away in zip(found, gone, strict=True) if not away]
        assert min(kept) >= W
        assert sum(kept) == min(6 * mean - W * sum(gone), 60 * len(kept))


def test_a_small_first_size_leaves_the_window() -> None:
    """C / 51 of 384 is 7.5: below the window, which is the floor."""
    view = layer_view(heads=4, entries=2000, layers=1, dim=2)
    found = GroupHeads(((0, 0, 1, 1),), (7.5, 512.0), W).split(torch.zeros(1, 4, 2000), torch.tensor([260]), view)
    assert found.tolist() == [[8, 8, 512, 512]]
    quarter = GroupHeads(((0, 0, 1, 1),), (96.0, 512.0), W).split(torch.zeros(1, 4, 2000), torch.tensor([304]), view)
    assert quarter.tolist() == [[96, 96, 512, 512]]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(OptionError, match="must name two groups at least: the first is given up"):
        DeletedHeads((), (1.0,), W)
    with pytest.raises(OptionError, match="protected=0 must be at least 1 entry"):
        DeletedHeads((), (1.0, 2.0), 0)
    with pytest.raises(RecipeError, match="outputs of other heads"):
        refuse(method("uncomp", deleted=True, budget=64))
