"""What a layer remembers of a request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvthrift.errors import CacheStateError
from kvthrift.integrations.vllm.books import Books

HEADS = 4


def numbered(first: int, last: int) -> torch.Tensor:
    """Queries ``[n, HG, 1]`` that say whose they are."""
    return torch.arange(first, last).float()[:, None, None].expand(-1, HEADS, 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 49))
def test_the_last_queries_before_any_token_of_the_newest_step(news: list[int], window: int, back: int) -> None:
    book, seen = Books().at("a", 1000, 0), 0
    for number, new in enumerate(news):
        behind = min(back, new - 1) if number == len(news) - 1 else 0
        book.seen = seen + new
        book.see(numbered(seen, seen + new), window + behind)
        seen += new
    found = book.before(seen - behind, window)
    want = range(max(0, seen - behind - window), seen - behind)
    assert found[:, 0, 0].tolist() == [float(n) for n in want]
    assert sum(len(piece) for piece in book.queries) < window + behind + max(news)


def test_a_request_that_is_read_anew_has_a_new_book() -> None:
    books = Books()
    book = books.at("a", 100, 0)
    book.seen, book.full, book.dropped = 120, 3, 2
    assert books.at("a", 100, 120) is book
    again = books.at("a", 100, 0)
    assert (again.full, again.dropped, again.seen) == (0, 0, 0)
    assert books.at("b", 100, 64).seen == 64  # a shared beginning


def test_a_prompt_that_grows_is_refused() -> None:
    books = Books()
    books.at("a", 100, 0).seen = 100
    with pytest.raises(CacheStateError, match="grew from 100 to 150"):
        books.at("a", 150, 100)


def test_what_is_forgotten() -> None:
    books = Books()
    for name in "abc":
        books.at(name, 10, 0)
    books.close({"b"})
    assert books.names == ("b",)


def test_positions_are_what_was_kept_and_what_came_since() -> None:
    book = Books().at("a", 100, 0)
    assert [head.tolist() for head in book.positions_of(2, 4, 6)] == [[0, 1, 2, 3, 4, 5]] * 2
    book.full, book.positions = 2, [torch.tensor([1, 7]), torch.tensor([0, 3, 5])]
    assert [head.tolist() for head in book.positions_of(2, 4, 10)] == [[1, 7, 8, 9], [0, 3, 5, 8, 9]]
