"""Words and numbers to hide: different ones, however many."""

from __future__ import annotations

import re
from random import Random

import pytest

from kvthrift.eval.tasks.words import ADJECTIVES, NOUNS, digits, distinct, plain_words, sample_words


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("word", r"[a-z]+-[a-z]+"), ("number", r"[1-9]\d{6}"), ("uuid", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-.{12}")],
)
def test_strings_differ_from_each_other_and_from_what_is_taken(kind: str, shape: str) -> None:
    first = distinct(Random(1), kind, 50)
    assert len(set(first)) == 50
    assert all(re.fullmatch(shape, one) for one in first)
    assert not set(first) & set(distinct(Random(1), kind, 50, first))
    assert distinct(Random(1), kind, 50) == first


def test_words_do_not_run_out() -> None:
    count = len(ADJECTIVES) * len(NOUNS)
    assert len(set(distinct(Random(1), "word", count))) == count


def test_lists_are_of_different_single_words_as_long_as_there_are_any() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    assert len(plain_words()) > 2000
    assert not any("-" in word for word in sample_words(Random(1), 500))
    assert len(set(sample_words(Random(1), 5000))) == 5000


def test_digits_are_as_many_as_asked_for() -> None:
    assert {len(digits(Random(seed), 64)) for seed in range(20)} == {64}
