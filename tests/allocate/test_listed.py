"""Listed layer budgets: the published completion, exact totals, floors, steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.views import layer_view

from kvthrift import ModelMismatchError, OptionError
from kvthrift.allocate import BudgetLayers
from kvthrift.allocate.listed import completed


def test_the_published_example_of_completion() -> None:
    assert completed((100, 50, 30, 20), 100).tolist() == [200, 100, 60, 40]


@given(
    entries=st.lists(st.integers(0, 4000), min_size=1, max_size=40),
    floor=st.integers(0, 64),
    more=st.integers(0, 500),
    step=st.sampled_from([1, 16, 64]),
)
def test_the_total_is_exact_and_the_order_and_the_floor_are_kept(
    entries: list[int], floor: int, more: int, step: int
) -> None:
    mean = (-(-floor // step) + more) * step
    found = completed(entries, mean, floor=floor, step=step).tolist()
    assert sum(found) == mean * len(entries)
    assert min(found) >= floor
    assert all(count % step == 0 for count in found)
    if any(entries):
        for a, x in zip(entries, found, strict=True):
            assert all(x >= y - step for b, y in zip(entries, found, strict=True) if a > b)  # but for rounding
            assert all(abs(x - y) <= step for b, y in zip(entries, found, strict=True) if a == b)


def totals(part: BudgetLayers, mean: int, layers: int, protected: int = 0) -> list[int]:
    views = [layer_view(layers=layers, layer=layer) for layer in range(layers)]
    return [int(part.total(view, torch.tensor([mean]), protected)[0]) for view in views]


def test_at_its_own_mean_the_list_is_what_layers_get() -> None:
    assert totals(BudgetLayers((90, 20, 41)), 51, 3) == [90, 20, 41]  # 151 / 3, rounded up
    assert totals(BudgetLayers((90, 20, 41)), 100, 3) == completed((90, 20, 41), 100).tolist()


def test_an_entry_below_what_is_protected_is_raised_and_the_total_stays() -> None:
    found = totals(BudgetLayers((90, 0, 30)), 40, 3, protected=32)
    assert sum(found) == 120
    assert min(found) == 32


def test_an_empty_list_is_uniform() -> None:
    assert totals(BudgetLayers(), 77, 3) == [77] * 3


def test_a_list_for_fewer_layers_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="is for 2 layers, but this model has at least 3"):
        totals(BudgetLayers((1, 1)), 50, 3)


def test_negative_entries_are_refused() -> None:
    with pytest.raises(OptionError, match="0 or more entries"):
        BudgetLayers((3, -1))
