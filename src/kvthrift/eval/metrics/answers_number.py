"""Scoring answers that are numbers: the first, the last, the boxed, numbered ones, shares. Knows nothing of tasks."""

from __future__ import annotations

import re

from kvthrift.eval.metrics.text import number, numbers
from kvthrift.eval.metrics.text_math import last_boxed, same
from kvthrift.eval.sample import Sample, Turn

_NEXT = re.compile(r"\n\s*(?:Question|Problem)\b")  # where a model that was shown examples goes on to its own
_ANSWER = re.compile(r"\bAnswer[ _#]*(\d+)\s*[:.)]", re.IGNORECASE)


def last_number(answer: str, gold: str) -> float:
    """1 if the last number before a question that the model made up is the reference (chains of thought)."""
    found = list(numbers(_NEXT.split(answer)[0]))
    return float(bool(found) and found[-1] == number(gold))


def first_number(answer: str, gold: str) -> float:
    """1 if the answer's first number is the reference (short answers that were started)."""
    found = next(numbers(answer), None)
    return float(found is not None and found == number(gold))


def boxed(answer: str, gold: str) -> float:
    """1 if the last boxed expression means the same as the reference."""
    found = last_boxed(answer)
    return float(found is not None and same(found, gold))


def share_of_numbers(answer: str, gold: str) -> float:
    """Share of the answer's numbers that are the reference's (LongBench's count and retrieval: "Paragraph 7")."""
    wanted, found = re.findall(r"\d+", gold), re.findall(r"\d+", answer)
    return sum(digits == wanted[0] for digits in found) / len(found) if found and wanted else 0.0


def numbered_answers(answer: str, sample: Sample, turn: Turn) -> float:
    """Share of the references that the answer of their number ends with; "Answer 1: ... Answer 2: ...".

    References are in order, a missing answer is wrong, and the first of two answers of one number counts.
    """
    parts = _ANSWER.split(turn.answer_prefix + answer)
    given: dict[int, str] = {}
    for place, text in zip(parts[1::2], parts[2::2], strict=True):
        given.setdefault(int(place), text)
    right = (last_number(given.get(place, ""), gold) for place, gold in enumerate(turn.answers, 1))
    return sum(right) / len(turn.answers)
