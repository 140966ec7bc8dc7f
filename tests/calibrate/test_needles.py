"""Needle tests: the answer stands where the span says, everything follows from seed and number."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift import CalibrationError
from kvthrift.calibrate.needles import NeedleTests
from kvthrift.data import demo_text

START = 7


def letters(text: str) -> list[int]:
    """One token a character."""
    return [ord(letter) for letter in text]


def words(text: str) -> list[int]:
    """One token a word, as its length."""
    return [100 + len(word) for word in text.split(" ")]


def spelled(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.integers(800, 3000), st.integers(0, 5))
def test_the_answer_stands_in_the_span_and_the_prompt_has_its_length(number: int, length: int, seed: int) -> None:
    test = NeedleTests(letters, demo_text(), length=length, seed=seed, start=(START,))[number]
    begin, end = test.span
    assert len(test.prompt) == length
    assert test.prompt[begin:end] == test.answer
    assert test.prompt[0] == START


def test_a_prompt_hides_one_fact_among_decoys_and_asks_for_it() -> None:
    for number, kind in enumerate(("number", "phrase")):
        test = NeedleTests(letters, demo_text(), length=2000, start=(START,))[number]
        prompt, answer = spelled(test.prompt), spelled(test.answer)
        assert prompt.count(f"The secret {kind} of the ") == 4  # the fact, two decoys, and the answer's beginning
        asked = prompt.rpartition("\nAnswer: ")[2]
        assert prompt.count(f"{asked}{answer}.") == 1
        assert prompt.endswith(f"Question: What is {asked[0].lower()}{asked[1:-3]}?\nAnswer: {asked}")


def test_seed_and_number_decide_everything() -> None:
    def take(seed: int, number: int, length: int = 900) -> object:
        return NeedleTests(letters, demo_text(), length=length, seed=seed)[number]

    assert take(0, 3) == take(0, 3)
    assert len({str(take(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_depths_are_spread_over_any_run_of_tests() -> None:
    tests = NeedleTests(letters, demo_text(), length=4000)
    for first in (0, 17):
        depths = sorted(tests[number].span[0] / 4000 for number in range(first, first + 10))
        assert depths[0] < 0.25
        assert depths[-1] > 0.75
        assert max(b - a for a, b in pairwise(depths)) < 0.3


def test_prompts_that_are_too_short_are_refused_with_the_length_that_is_enough() -> None:
    with pytest.raises(CalibrationError, match=r"prompts of 100 tokens are too short.* a length of (\d+)") as refused:
        NeedleTests(letters, demo_text(), length=100)
    enough = int(str(refused.value).split("length of ")[1].split()[0])
    assert len(NeedleTests(letters, demo_text(), length=enough)[0].prompt) == enough
    with pytest.raises(CalibrationError):
        NeedleTests(letters, demo_text(), length=enough - 1)


@pytest.mark.parametrize("text", ["", "\n\n\n", "Too short."])
def test_a_text_that_is_too_short_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="too few to fill prompts of 900"):
        NeedleTests(letters, text, length=900)


def test_a_text_that_is_just_long_enough_is_used_whole() -> None:
    text = "\n\n".join(["word"] * 400)
    for number in range(20):
        assert len(NeedleTests(words, text, length=390)[number].prompt) == 390
