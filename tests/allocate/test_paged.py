"""Grants rounded to whole pages: never more pages than there are, and hardly an entry less than was granted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift.allocate.paged import PageRoom, in_pages
from kvthrift.allocate.share import share_out


def pages(counts: list[int], room: int, *, length: int = 1000, least: int = 1, page: int = 16) -> list[int]:
    n = len(counts)
    return in_pages(np.array(counts), np.full(n, length), np.full(n, least), page, room).tolist()


@pytest.mark.parametrize(
    ("counts", "room", "wanted"),
    [
        ([32, 32], 4, [2, 2]),
        ([40, 24], 4, [3, 1]),  # equal remainders: the lowest head
        ([39, 25], 4, [2, 2]),  # the larger remainder takes what the other gives back
        ([63, 1], 4, [3, 1]),  # one entry needs a page, so that the other has one less
        ([1, 1, 62], 4, [1, 1, 2]),
        ([20, 20, 20], 3, [1, 1, 1]),
        ([20, 20, 20], 9, [2, 2, 2]),  # no more than was granted, rounded up
    ],
)
def test_pages_of_heads(counts: list[int], room: int, wanted: list[int]) -> None:
    assert pages(counts, room) == wanted


def test_a_short_head_gets_no_page_that_it_cannot_use() -> None:
    found = in_pages(np.array([100, 28]), np.array([100, 28]), np.array([1, 1]), 16, 8)
    assert found.tolist() == [6, 2]
    assert in_pages(np.array([90, 10]), np.array([100, 10]), np.array([1, 1]), 16, 50).tolist() == [6, 1]


def test_heads_keep_what_they_must() -> None:
    assert pages([100, 2, 2], 8, least=2) == [4, 2, 2]


sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.integers(1, 6))


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 10**6), st.integers(1, 90), st.booleans())
def test_no_split_of_a_budget_takes_more_pages_than_it_has(
    size: tuple[int, int, int, int], seed: int, protected: int, even: bool
) -> None:
    layers, heads, page, mean = size
    rng = np.random.default_rng(seed)
    protected = min(protected, mean * page)
    per_head = np.array([mean * page, mean * page])
    lengths = rng.integers(1, 3 * mean * page + 2, size=(layers, 2, heads))
    room = PageRoom(per_head * layers * heads, layers, page, protected)
    weights = rng.random((2, layers * heads)) ** rng.integers(1, 9)
    caps = lengths.transpose(1, 0, 2).reshape(2, -1)
    asked = np.stack([share_out(mean * page * layers * heads, w, c) for w, c in zip(weights, caps, strict=True)])
    total = np.zeros(2, dtype=np.int64)
    kept = np.zeros(2, dtype=np.int64)
    for layer, counts in enumerate(asked.reshape(2, layers, heads).transpose(1, 0, 2)):
        if even:
            counts = np.repeat(counts.sum(axis=1, keepdims=True) // heads, heads, axis=1)
        found = room.grant(counts, lengths[layer], even=even)
        assert (found <= lengths[layer]).all()
        assert (found >= np.minimum(lengths[layer], max(protected, 1))).all()
        assert ((found % page == 0) | (found == lengths[layer])).all()
        if even:
            assert (found == np.minimum(lengths[layer], found.max(axis=1, keepdims=True))).all()
        total += (-(-found // page)).sum(axis=1)
        kept += found.sum(axis=1)
    assert (total <= mean * layers * heads).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([4, 16, 64]))
def test_no_entry_is_lost_where_heads_are_long_and_none_is_granted_less_than_a_page(
    seed: int, layers: int, page: int
) -> None:
    rng, heads, mean = np.random.default_rng(seed), 4, 5
    room = PageRoom(np.array([mean * page * layers * heads]), layers, page, 1)
    kept = 0
    for _ in range(layers):  # every layer its heads' mean, as where heads compete within a layer
        free = share_out((mean - 1) * page * heads, rng.random(heads) ** 3, np.full(heads, 10**6))
        found = room.grant(free[None] + page, np.full((1, heads), 10**6), even=False)
        assert np.abs(found[0] - free - page).max() < page
        kept += int(found.sum())
    assert kept == mean * page * heads * layers


def test_what_a_layer_leaves_goes_to_the_next() -> None:
    room = PageRoom(np.array([128]), 2, 16, 1)
    lengths = np.full((1, 2), 100)
    assert room.grant(np.array([[40, 40]]), lengths, even=True).tolist() == [[32, 32]]
    assert room.grant(np.array([[24, 24]]), lengths, even=True).tolist() == [[32, 32]]
    first = PageRoom(np.array([64]), 2, 16, 1)  # layers that are granted nothing have their page all the same
    assert first.grant(np.array([[60, 4]]), lengths, even=False).tolist() == [[16, 16]]
    assert first.grant(np.array([[0, 0]]), lengths, even=False).tolist() == [[16, 16]]


def test_sequences_are_apart() -> None:
    both = PageRoom(np.array([64, 96]), 1, 16, 1)
    found = both.grant(np.array([[40, 24], [90, 6]]), np.full((2, 2), 100), even=False)
    assert found.tolist() == [[48, 16], [80, 16]]
