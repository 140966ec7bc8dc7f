"""Numbers: last, first, boxed, numbered, shared."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.metrics.text import number, numbers
from kvthrift.eval.metrics.text_math import last_boxed, same
from kvthrift.eval.sample import Sample, Turn


def score(name: str, answer: str, *gold: str, prefix: str = "") -> float:
    turn = Turn("How many?", gold, prefix)
    return SCORERS[name](answer, Sample("0", "toy", "context", (turn,), name), turn)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It costs $1,234.50, or 5%.", ["1234.5", "5"]),
        ("minus -3 and 1,2,3", ["-3", "1", "2", "3"]),
        ("A4 paper, x2 and .5", ["0.5"]),
        ("the 3rd of 10.", ["3", "10"]),
        ("12-15", ["12", "15"]),
        ("<2416>", ["2416"]),
        ("no digits - at all.", []),
        ("1,234,567 people", ["1234567"]),
        ("07", ["7"]),
    ],
)
def test_numbers_of_a_text(text: str, found: list[str]) -> None:
    assert list(numbers(text)) == [Fraction(digits) for digits in found]


@given(st.integers(-(10**9), 10**9))
def test_numbers_read_back(whole: int) -> None:
    assert number(f"{whole:,}") == number(str(whole)) == whole


def test_the_last_number_counts() -> None:
    assert score("last_number", "2 + 3 = 5. The answer is $1,005.00.", "1005") == 1
    assert score("last_number", "The answer is 5 (not 6)", "5") == 0
    assert score("last_number", "none", "5") == 0
    assert score("last_number", "so 18.\n\nQuestion: what is 2 + 2?\nAnswer: 4", "18") == 1  # made up by the model
    assert score("last_number", "18", "eighteen") == 0


def test_the_first_number_counts_where_answers_are_started() -> None:
    assert score("first_number", "2416>\nline x: REGISTER_CONTENT is <99>", "2416") == 1
    assert score("first_number", "24160", "2416") == 0


def test_shares_of_numbers() -> None:
    assert score("count", "The final answer is 12", "12") == 1
    assert score("count", "12 or 13", "12") == 0.5
    assert score("count", "twelve", "12") == 0
    assert score("retrieval", "Paragraph 7, Paragraph 7, Paragraph 8", "Paragraph 7") == pytest.approx(2 / 3)
    assert score("retrieval", "17", "Paragraph 7") == 0
    assert score("retrieval", "7", "段落7") == 1


def test_numbered_answers() -> None:
    said = " 2 + 2 = 4. The answer is 4.\nAnswer 2: it is 10.\nAnswer_3: 5, no, 6"
    assert score("numbered_answers", said, "4", "10", "6", prefix="Answer 1:") == 1
    assert score("numbered_answers", said, "4", "10", "5", prefix="Answer 1:") == pytest.approx(2 / 3)
    assert score("numbered_answers", said, "4", "10", "6", "9", prefix="Answer 1:") == 0.75  # the fourth is missing
    assert score("numbered_answers", "4, 10, 6", "4", "10", "6") == 0
    assert score("numbered_answers", "Answer 1: 4 Answer 1: 5", "4") == 1  # the first of its number
    assert score("numbered_answers", "Answer 2: 10", "4", "10") == 0.5
    assert score("numbered_answers", "", "4") == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{5} and then \\boxed{ 6 }.", "6"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\fbox{x}", "x"),
        ("\\boxed{1", None),
        ("nothing", None),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_box(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("\\frac{1}{2}", "\\dfrac12"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\frac{3}{4}", "-0.75"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\text{Evelyn}", "Evelyn"),
        ("10,080", "10080"),
        ("\\$32.50", "32.5"),
        ("90^\\circ", "90"),
        ("50\\%", "50"),
        ("x = 5", "5"),
        ("2\\sqrt{3}", "2\\sqrt3"),
        ("5 \\text{ cm}", "5"),
        ("6.0", "6"),
        ("3 \\cdot 4", "3*4"),
        ("\\frac{\\sqrt{2}}{2}", "\\sqrt{2}/2"),
        ("p - q", "p-q"),
    ],
)
def test_the_same_in_other_words(left: str, right: str) -> None:
    assert same(left, right)
    assert same(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("\\frac{1}{2}", "\\frac{1}{3}"),
        ("(1,2)", "(2,1)"),
        ("12", "1,2"),
        ("x+1", "x-1"),
        ("\\frac{1}{0}", "1"),
        ("\\text{east}", "\\text{west}"),
        ("", "0"),
        ("2^3", "23"),
        ("a_1", "a1"),
        ("2(3)", "23"),
        ("(1)(2)", "12"),
    ],
)
def test_not_the_same(left: str, right: str) -> None:
    assert not same(left, right)


def test_boxed_answers() -> None:
    assert score("boxed", "thus $\\boxed{\\tfrac{1}{2}}$", "0.5") == 1
    assert score("boxed", "thus 0.5", "0.5") == 0
