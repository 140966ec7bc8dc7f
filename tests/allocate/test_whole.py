"""Whole heads: as many as there is room for, in order; the total is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view

from kvthrift import ModelMismatchError, OptionError, Recipe, RecipeError
from kvthrift.allocate import PyramidLayers, WholeHeads
from kvthrift.score import Recency

TABLE = ((0.2, 0.9), (0.7, 0.1), (0.5, 0.8))


def counts(per_head: int, length: int = 100, protected: int = 10) -> list[list[int]]:
    part = WholeHeads(TABLE, protected)
    return part.capacities(per_head, length, np.asarray(TABLE)).tolist()


def test_the_most_important_are_whole_and_the_next_takes_what_is_left() -> None:
    assert counts(10) == [[10, 10]] * 3
    assert counts(25) == [[10, 100], [10, 10], [10, 10]]
    assert counts(55) == [[10, 100], [100, 10], [10, 100]]
    assert counts(60) == [[10, 100], [100, 10], [40, 100]]
    assert counts(100) == counts(500) == [[100, 100]] * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 120), st.integers(1, 90), st.integers(0, 20))
def test_the_total_is_exact_and_all_heads_but_one_are_whole_or_bare(
    seed: int, per_head: int, length: int, protected: int
) -> None:
    table = np.random.default_rng(seed).integers(0, 6, (4, 3)).astype(np.float64)
    found = WholeHeads((), protected).capacities(per_head, length, table)
    least = min(max(protected, 1), length)
    assert found.sum() == 12 * max(min(per_head, length), least)
    assert ((found != least) & (found != length)).sum() <= 1
    order = np.argsort(-table.reshape(-1), kind="stable")
    assert (np.diff(found.reshape(-1)[order]) <= 0).all()


def test_each_sequence_and_layer_gets_its_own() -> None:
    view = layer_view(batch=2, heads=2, entries=50, layer=2, layers=3)
    found = WholeHeads(TABLE, 5).split(torch.zeros(2, 2, 50), torch.tensor([25, 50]), view)
    # 20 spare entries a head of 45: two whole ones and 30 for the next, which is the lower layer's
    assert found.tolist() == [[5, 50], [50, 50]]


def test_rows_are_the_models_own_numbers() -> None:
    view = layer_view(heads=2, entries=50, layer=1, layers=2)
    view.numbers = (0, 2)
    found = WholeHeads(TABLE, 5).split(torch.zeros(1, 2, 50), torch.tensor([28]), view)
    assert found.tolist() == [[7, 50]]  # 92 spare entries: 45 each for the 0.9 and the 0.8, 2 for the 0.5


def test_within_a_layer_its_own_heads_compete() -> None:
    view = layer_view(heads=2, entries=50, layer=2, layers=3)
    part = WholeHeads(TABLE, 5, within="layer")
    assert part.split(torch.zeros(1, 2, 50), torch.tensor([25]), view).tolist() == [[5, 45]]
    assert part.split(torch.zeros(1, 2, 50), torch.tensor([40]), view).tolist() == [[30, 50]]


def test_layers_of_unequal_budgets_are_refused_unless_heads_compete_within() -> None:
    with pytest.raises(RecipeError, match="heads=whole shares room out over all layers, but layers=pyramid gives each"):
        Recipe("x", Recency(), layers=PyramidLayers(), heads=WholeHeads(TABLE))
    Recipe("x", Recency(), layers=PyramidLayers(), heads=WholeHeads(TABLE, within="layer"))


def test_without_a_table_heads_go_by_number() -> None:
    view = layer_view(heads=2, entries=50, layer=0, layers=2)
    assert WholeHeads((), 5).split(torch.zeros(1, 2, 50), torch.tensor([25]), view).tolist() == [[50, 40]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="for 3 layers of 2 KV heads, but this model has at least 1 of 3"):
        WholeHeads(TABLE).split(torch.zeros(1, 3, 50), torch.tensor([25]), layer_view(heads=3, layers=1))
    with pytest.raises(ModelMismatchError, match="this model has at least 4 of 2"):
        WholeHeads(TABLE).split(torch.zeros(1, 2, 50), torch.tensor([25]), layer_view(heads=2, layers=4))
    with pytest.raises(OptionError, match="must be finite"):
        WholeHeads(((float("nan"),),))
    with pytest.raises(OptionError, match="protected=-1"):
        WholeHeads((), -1)
