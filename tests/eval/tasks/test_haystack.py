"""Places, depths and sentences."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvthrift.eval.tasks.haystack import SHIPPED, books, boundary, essays, insert, sentences, spread


def test_sentences_end_where_sentences_end() -> None:
    text = 'He said: `Stop!\' Then Mr. Bennet came. Was it 3.5 miles? "Yes." They left'
    assert sentences(text) == ["He said: `Stop!'", "Then Mr. Bennet came.", "Was it 3.5 miles?", '"Yes."', "They left"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.floats(0, 1))
def test_boundary_is_the_last_at_or_before_the_depth(tokens: list[int], depth: float) -> None:
    place = boundary(tokens, depth)
    assert sum(tokens[:place]) <= depth * sum(tokens) + 1e-6
    assert place == len(tokens) or sum(tokens[: place + 1]) > depth * sum(tokens)


def test_boundary_of_both_ends() -> None:
    assert boundary([3, 4, 5], 0.0) == 0
    assert boundary([3, 4, 5], 1.0) == 3
    assert boundary([3, 4, 5], 7 / 12) == 2


def test_insert_keeps_both_orders() -> None:
    assert insert(["a", "b", "c"], ["1", "2", "3"], [0, 2, 3]) == ["1", "a", "b", "2", "c", "3"]
    assert insert(["a"], ["1", "2"], [1, 1]) == ["a", "1", "2"]


@given(st.integers(1, 60))
def test_spread_takes_every_depth_once_before_any_twice(points: int) -> None:
    depths = [spread(number, points) for number in range(points)]
    assert len(set(depths)) == points
    assert all(0 <= depth <= 1 for depth in depths)
    assert spread(points, points) == depths[0]
    if points > 1:
        assert {0.0, 1.0} <= set(depths)


def test_without_data_the_shipped_book_is_read(no_data: None) -> None:
    text, source = essays(None)
    assert source == SHIPPED
    assert "Alice" in text
    assert list(books(None)) == [SHIPPED]


def test_local_essays_are_read_instead(tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "one.txt").write_text("First essay.")
    (tmp_path / "essays" / "two.txt.gz").write_bytes(gzip.compress(b"Second essay."))
    assert essays(tmp_path) == ("First essay.\n\nSecond essay.", "essays")


def test_the_environment_names_the_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "novel.txt").write_text("Once upon a time.")
    monkeypatch.setenv("KVTHRIFT_DATA", str(tmp_path))
    assert dict(books(None)) == {"novel": "Once upon a time."}
