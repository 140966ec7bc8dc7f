"""Budgets: what can be read, what is refused with a reason, and what they come to in entries."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift import Budget, BudgetError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        (512, 512, "entries"),
        ("512", 512, "entries"),
        (" 512 ", 512, "entries"),
        ("+7", 7, "entries"),
        ("2.0", 2, "entries"),
        ("25%", Fraction(1, 4), "share"),
        ("25 %", Fraction(1, 4), "share"),
        ("0.1%", Fraction(1, 1000), "share"),
        ("100%", 1, "share"),
        ("64MiB", 64 * 2**20, "bytes"),
        ("64 mib", 64 * 2**20, "bytes"),
        ("1.5KiB", 1536, "bytes"),
        ("2GB", 2 * 10**9, "bytes"),
        ("10kB", 10**4, "bytes"),
        ("800b", 800, "bytes"),
    ],
)
def test_what_can_be_read(text: int | str, amount: Fraction, unit: str) -> None:
    assert Budget.parse(text) == Budget(Fraction(amount), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0, "leave nothing"),
        (-5, "leave nothing"),
        ("0", "leave nothing"),
        ("-1%", "leave nothing"),
        ("0%", "leave nothing"),
        ("0MiB", "leave nothing"),
        ("0.1b", "leave nothing"),
        ("101%", "more than the whole"),
        ("1000%", "more than the whole"),
        ("abc", "cannot be read"),
        ("", "cannot be read"),
        ("%", "cannot be read"),
        ("1e3", "cannot be read|unknown unit"),
        ("nan", "cannot be read"),
        ("inf", "cannot be read"),
        ("12 3", "cannot be read"),
        ("1,000", "cannot be read"),
        ("--5", "cannot be read"),
        ("12XB", "unknown unit 'XB'"),
        ("5 tokens", "unknown unit 'tokens'"),
        ("12%%", "cannot be read"),
        ("1.5", "whole number of entries"),
        (True, "no unit"),
        (1.5, "no unit"),
        (0.25, "no unit"),
        (None, "no unit"),
        ([512], "no unit"),
    ],
)
def test_what_is_refused_says_why_and_how_to_write_it(value: Any, why: str) -> None:
    with pytest.raises(BudgetError, match=why) as error:
        Budget.parse(value)
    assert "64MiB" in str(error.value) or "100%" in str(error.value)


shares = st.decimals("0.00000001", "100", places=8).map(lambda n: f"{n:f}%")
texts = st.one_of(st.integers(1, 10**12).map(str), shares, st.integers(1, 10**15).map(lambda n: f"{n}B"))


@settings(deadline=None)
@given(texts)
def test_a_budget_is_what_its_text_says(text: str) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget


def test_a_share_of_no_finite_decimal_can_still_be_written_and_read() -> None:
    found = Budget.parse(str(Budget(Fraction(1, 3), "share"))).amount
    assert abs(found - Fraction(1, 3)) < Fraction(1, 10**20)


@pytest.mark.parametrize(
    "text", ["512", "25%", "12.5%", "12.3456789%", "0.00001%", "100%", "64MiB", "3GiB", "1536KiB", "1000B"]
)
def test_a_budget_reads_as_its_owner_wrote_it(text: str) -> None:
    assert str(Budget.parse(text)) == text


def entries(text: str, length: int, **sizes: int) -> int:
    return Budget.parse(text).entries(length, **{"heads": 4, "entry_bytes": 10, "page": 64, **sizes})


def test_entries_and_shares_are_a_heads_own() -> None:
    assert entries("512", 10) == 512
    assert entries("25%", 1000) == 250
    assert entries("60%", 10) == 6
    assert entries("29%", 100) == 29  # 0.29 * 100 is a float short of 29
    assert entries("100%", 777) == 777
    assert entries("1%", 3) == 1  # never an empty cache


def test_bytes_are_handed_out_in_whole_pages() -> None:
    page = 4 * 10 * 64
    assert entries(f"{page}b", 1000) == 64
    assert entries(f"{2 * page - 1}b", 1000) == 64
    assert entries(f"{2 * page}b", 1000) == 128
    assert entries("1MiB", 10**6) == 2**20 // 40 // 64 * 64
    assert entries(f"{page}b", 1000, page=16) == 64


def test_bytes_enough_for_the_pages_of_everything_are_not_rounded_down() -> None:
    assert entries("5200b", 70) == 130
    assert entries("5120b", 70) == 128  # two pages of 64 entries in each of four heads
    assert entries("5119b", 70) == 64
    assert entries("2560b", 30) == 64


def test_too_few_bytes_are_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(BudgetError, match=r"too few bytes for 4 heads: one page of 64 entries a head.* 2560 bytes"):
        entries("2559b", 1000)
    with pytest.raises(BudgetError, match="too few bytes"):
        entries("2559b", 30)  # 30 entries would do, but a page is held


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 64), st.sampled_from([1, 16, 64]))
def test_bytes_given_are_never_exceeded_in_pages(given_: int, length: int, heads: int, page: int) -> None:
    try:
        found = entries(f"{given_}b", length, heads=heads, page=page)
    except BudgetError:
        assert given_ < heads * 10 * page
        return
    assert found >= 1
    held = -(-min(found, length) // page) * page
    assert held * heads * 10 <= given_
    assert found >= length or found % page == 0


@settings(deadline=None)
@given(
    st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 64), st.sampled_from([1, 16, 64]), st.integers(0, 100)
)  # fmt: skip
def test_heads_that_differ_share_all_whole_pages(given_: int, length: int, heads: int, page: int, least: int) -> None:
    try:
        even = entries(f"{given_}b", length, heads=heads, page=page)
    except BudgetError:
        with pytest.raises(BudgetError):
            entries(f"{given_}b", length, heads=heads, page=page, least=least)
        return
    found = entries(f"{given_}b", length, heads=heads, page=page, least=least)
    room, needed = given_ // (10 * page) * page, -(-least // page) * page  # entries of all heads, of one
    if even >= length or found < needed:
        assert found == even
    else:
        assert found * heads <= room
        assert found in (room // heads, length - 1)


def test_bytes_over_whole_pages_a_head_are_for_heads_that_differ() -> None:
    page = 4 * 10 * 64
    assert entries(f"{7 * page // 4}b", 1000) == 64
    assert entries(f"{7 * page // 4}b", 1000, least=8) == 7 * 16  # seven pages
    assert entries(f"{8 * page // 4 - 1}b", 1000, least=8) == 7 * 16
    assert entries(f"{7 * page // 4}b", 1000, least=65) == 64  # every head needs two: refused by who protects them
    assert entries(f"{7 * page // 4}b", 100, least=8) == 99  # two pages a head, which there are not
    assert entries(f"{7 * page // 4}b", 64, least=8) == 112  # all fit


def test_a_budget_passes_through_and_compares_by_value() -> None:
    budget = Budget.parse("50%")
    assert Budget.parse(budget) is budget
    assert budget == Budget.parse("50.0%")
    assert hash(budget) == hash(Budget.parse("50.0%"))
    assert budget != Budget.parse("50")
