"""Scoring answers that choose: letters, labels, classes, orders. Knows nothing of tasks."""

from __future__ import annotations

import re
from itertools import combinations

from kvthrift.eval.metrics.text import first_line
from kvthrift.eval.sample import Sample, Turn

_SAID = r"(?i:answer|choice|option)(?i: is|:| would be)*:? *[\"'(\[*]*({})\b"
_MARKED = r"[(\[*]({})[)\]*]|^\W*({})(?:[.):,*]|\s*$)"


def choice(answer: str, sample: Sample, turn: Turn) -> float:
    """1 if the answer chooses the reference among ``meta["choices"]``.

    Looked for in turn: "the answer is B"; "(B)" or "B." or a line of "B"; the first choice that stands by itself.
    Single letters must be capitals, longer choices (Yes, True) may be in any case.
    """
    chosen = chosen_of(answer, tuple(sample.meta["choices"]))
    return float(chosen is not None and chosen in turn.answers)


def chosen_of(answer: str, choices: tuple[str, ...]) -> str | None:
    """The choice that an answer makes; None where it makes none."""
    listed = "|".join(map(re.escape, choices))
    letters = all(len(label) == 1 for label in choices)
    case = 0 if letters else re.IGNORECASE
    for pattern in (_SAID.format(listed), _MARKED.format(listed, listed), rf"\b({listed})\b"):
        match = re.search(pattern, answer, case | re.MULTILINE)
        if match:
            found = next(group for group in match.groups() if group)
            return next(label for label in choices if label == found or (case and label.lower() == found.lower()))
    return None


def only_label(answer: str, sample: Sample, turn: Turn) -> float:
    """1 if the answer's first sentence names the reference's labels and no other of ``meta["labels"]`` (BABILong).

    Labels of the question are left aside, unless they are the reference's.
    """
    said, asked = re.split(r"[.\n]", answer.strip().lower())[0], turn.question.lower()
    wanted = {part.lower() for part in turn.answers[0].split(",")}
    labels = {str(label).lower() for label in sample.meta["labels"]}
    found = {label for label in labels if _names(said, label) and (label in wanted or not _names(asked, label))}
    return float(found == wanted)


def _names(text: str, label: str) -> bool:
    return re.search(rf"\b{re.escape(label)}\b", text) is not None


def classification(answer: str, sample: Sample, turn: Turn) -> float:
    """1 / (classes named) if the reference is among them; names that are part of the reference's do not count."""
    text = first_line(answer) if sample.meta.get("first_line") else answer
    named = [label for label in sample.meta["classes"] if label in text]
    return max((_among(named, gold) for gold in turn.answers), default=0.0)


def _among(named: list[str], gold: str) -> float:
    left = [label for label in named if label == gold or label not in gold]
    return 1 / len(left) if gold in left else 0.0


def order(answer: str, gold: str) -> float:
    """Share of pairs in the right order; 0 unless the answer has as many numbers as the reference (BAMBOO)."""
    given, wanted = ([int(digits) for digits in re.findall(r"\d+", text)] for text in (answer, gold))
    if len(given) != len(wanted):
        return 0.0
    if min(given, default=0) == 1 and 0 not in given and 0 in wanted:  # counted from one
        given = [place - 1 for place in given]
    right = set(combinations(wanted, 2))
    return len(right & set(combinations(given, 2))) / len(right) if right else float(given == wanted)
