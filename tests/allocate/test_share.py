"""Whole shares of a whole number: the books must balance whatever the weights are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift.allocate import share_out

Weights = st.lists(st.floats(0, 1e12), min_size=1, max_size=12)


def share(total: int, weights: list[float], caps: list[int]) -> list[int]:
    found = share_out(total, np.array(weights), np.array(caps, dtype=np.int64))
    return [int(x) for x in found]


@settings(max_examples=200, deadline=None)
@given(Weights, st.integers(0, 3000), st.data())
def test_shares_add_up_to_the_total_or_to_the_caps(weights: list[float], total: int, data: st.DataObject) -> None:
    caps = data.draw(st.lists(st.integers(0, 400), min_size=len(weights), max_size=len(weights)))
    shares = share(total, weights, caps)
    assert sum(shares) == min(total, sum(caps))
    assert all(0 <= s <= cap for s, cap in zip(shares, caps, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9), st.integers(0, 500), st.data())
def test_more_weight_and_no_less_room_never_get_a_smaller_share(
    weights: list[int], total: int, data: st.DataObject
) -> None:
    caps = data.draw(st.lists(st.integers(0, 120), min_size=len(weights), max_size=len(weights)))
    shares = share(total, [float(w) for w in weights], caps)
    for i, j in np.ndindex(len(weights), len(weights)):
        if weights[i] > weights[j] and caps[i] >= caps[j]:
            assert shares[i] >= shares[j]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 500))
def test_without_caps_every_share_is_its_exact_quota_rounded_down_or_up(weights: list[int], total: int) -> None:
    shares = share(total, [float(w) for w in weights], [total] * len(weights))
    for s, w in zip(shares, weights, strict=True):
        assert total * w // sum(weights) <= s <= -(-total * w // sum(weights))


@pytest.mark.parametrize(
    ("total", "weights", "caps", "shares"),
    [
        (10, [3.0, 1.0, 1.0], [100, 100, 100], [6, 2, 2]),
        (10, [3.0, 1.0, 1.0], [4, 100, 100], [4, 3, 3]),  # what a cap leaves goes on by weight
        (11, [3.0, 1.0, 1.0], [4, 100, 100], [4, 4, 3]),  # ties go to the lowest index
        (2, [1.0, 1.0, 1.0], [9, 9, 9], [1, 1, 0]),
        (7, [0.0, 0.0], [9, 9], [4, 3]),  # no weight at all is equal weight
        (7, [float("nan"), 1.0], [9, 9], [0, 7]),
        (12, [0.0, 1.0], [9, 9], [3, 9]),  # the weightless take what nobody else can
        (50, [1.0, 5.0], [9, 9], [9, 9]),
        (0, [1.0, 5.0], [9, 9], [0, 0]),
        (-3, [1.0, 5.0], [9, 9], [0, 0]),
        (5, [1.0, 1.0, 1.0], [0, 9, 0], [0, 5, 0]),
        (10, [1e-300, 1e300], [10, 10], [0, 10]),
        (8, [1e38, 1e38, 1e38, 1e38], [8, 8, 8, 8], [2, 2, 2, 2]),
    ],
)
def test_shares_by_hand(total: int, weights: list[float], caps: list[int], shares: list[int]) -> None:
    assert share(total, weights, caps) == shares
