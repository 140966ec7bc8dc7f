"""Choices, labels, classes and orders."""

from __future__ import annotations

import pytest

from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.metrics.answers_choice import chosen_of
from kvthrift.eval.sample import Sample, Turn


def score(name: str, answer: str, *gold: str, question: str = "Which?", **meta: object) -> float:
    turn = Turn(question, gold)
    return SCORERS[name](answer, Sample("0", "toy", "context", (turn,), name, meta=dict(meta)), turn)


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        (" B", "B"),
        ("B.", "B"),
        ("B) because A is wrong", "B"),
        ("(C) human beings", "C"),
        ("The answer is D.", "D"),
        ("A good question. The correct answer is: (C).", "C"),
        ("Answer: **B**", "B"),
        ("I think C, since D is not", "C"),
        ("Because of it, the choice would be A", "A"),
        ("Definitely B", "B"),
        ("b", None),
        ("Apples", None),
        ("", None),
        ("D\n\nQuestion: more", "D"),
    ],
)
def test_letters(answer: str, chosen: str | None) -> None:
    assert chosen_of(answer, ("A", "B", "C", "D")) == chosen


@pytest.mark.parametrize(
    ("answer", "chosen"), [("yes.", "Yes"), ("No, it does not", "No"), ("The answer is NO", "No"), ("Nobody", None)]
)
def test_words_may_be_in_any_case(answer: str, chosen: str | None) -> None:
    assert chosen_of(answer, ("Yes", "No")) == chosen


def test_choices_are_scored() -> None:
    assert score("choice", " C\n", "C", choices=("A", "B", "C")) == 1
    assert score("choice", " B\n", "C", choices=("A", "B", "C")) == 0
    assert score("choice", "dunno", "C", choices=("A", "B", "C")) == 0


PLACES = ("bathroom", "garden", "kitchen")


def test_one_label_and_no_other() -> None:
    assert score("only_label", " Garden. The kitchen is elsewhere", "garden", labels=PLACES) == 1
    assert score("only_label", "garden or kitchen", "garden", labels=PLACES) == 0
    assert score("only_label", "garden\nkitchen", "garden", labels=PLACES) == 1
    assert score("only_label", "gardener", "garden", labels=PLACES) == 0
    assert score("only_label", "", "garden", labels=PLACES) == 0


def test_labels_of_the_question_are_left_aside() -> None:
    asked = "Where was the apple before the bathroom?"
    assert score("only_label", "before the bathroom in the garden", "garden", labels=PLACES, question=asked) == 1
    assert score("only_label", "yes", "yes", labels=("yes", "no"), question="Is John in the kitchen?") == 1


def test_lists_are_sets_of_labels() -> None:
    things = ("apple", "football", "milk", "nothing")
    assert score("only_label", "milk and apple", "apple,milk", labels=things) == 1
    assert score("only_label", "milk", "apple,milk", labels=things) == 0
    assert score("only_label", "nothing", "nothing", labels=things) == 1


CLASSES = ("Number", "Number of something", "City", "Abbreviation")


def test_classes_share_the_point() -> None:
    assert score("classification", "City", "City", classes=CLASSES) == 1
    assert score("classification", "City or Abbreviation", "City", classes=CLASSES) == 0.5
    assert score("classification", "Number", "City", classes=CLASSES) == 0
    assert score("classification", "", "City", classes=CLASSES) == 0


def test_names_that_are_part_of_the_right_one_do_not_count() -> None:
    assert score("classification", "Number of something", "Number of something", classes=CLASSES) == 1
    assert score("classification", "Number of something", "Number", classes=CLASSES) == 0.5


def test_only_the_first_line_counts_where_the_sample_says_so() -> None:
    said = "\nCity\nType: Abbreviation"
    assert score("classification", said, "City", classes=CLASSES, first_line=True) == 1
    assert score("classification", said, "City", classes=CLASSES) == 0.5


def test_orders() -> None:
    assert score("order", "[2] > [0] > [1]", "2 0 1") == 1
    assert score("order", "[1] > [0] > [2]", "2 0 1") == pytest.approx(0)
    assert score("order", "[0] > [2] > [1]", "2 0 1") == pytest.approx(2 / 3)
    assert score("order", "[3] > [1] > [2]", "2 0 1") == 1  # counted from one
    assert score("order", "[2] > [0]", "2 0 1") == 0
    assert score("order", "no idea", "2 0 1") == 0
