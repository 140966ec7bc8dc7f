"""Scoring code by likeness to a reference, without running it. Knows nothing of tasks."""

from __future__ import annotations

import re

from rapidfuzz import fuzz

_FENCE = re.compile(r"```[a-z]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NEXT = re.compile(r"^(?:def |class |if __name__|print\(|#|```|\"\"\"|assert )", re.MULTILINE)


def likeness(left: str, right: str) -> float:
    """Edit similarity, in hundredths like the tables': 2 * matches / characters of both."""
    return round(fuzz.ratio(left, right)) / 100


def code_edit(answer: str, gold: str) -> float:
    """Edit similarity of the first line that has no code fence and no comment mark (LongBench)."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return likeness(line, gold)


def code_block(answer: str, gold: str) -> float:
    """Edit similarity of a whole body, up to the next definition, test or fence; blank lines are left aside."""
    fenced = _FENCE.search(answer)
    text = fenced[1] if fenced else answer
    starts = [match.start() for match in _NEXT.finditer(text)]
    own = len(_NEXT.findall(gold))  # a reference may have definitions itself
    return likeness(_tidy(text[: starts[own]] if len(starts) > own else text), _tidy(gold))


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
