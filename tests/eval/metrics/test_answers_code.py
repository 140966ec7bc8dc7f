"""Code by likeness."""

from __future__ import annotations

import pytest

from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.metrics.answers_code import likeness
from kvthrift.eval.sample import Sample, Turn


def score(name: str, answer: str, *gold: str) -> float:
    turn = Turn("code", gold)
    return SCORERS[name](answer, Sample("0", "toy", "context", (turn,), name), turn)


def test_likeness_is_twice_the_shared_over_both() -> None:
    assert likeness("abcd", "abcd") == 1
    assert likeness("abcd", "abxd") == 0.75  # 2 * 3 / 8
    assert likeness("ab", "abc") == 0.8
    assert likeness("", "abc") == 0


def test_the_first_line_that_is_code_counts() -> None:
    assert score("code_edit", "\n\nreturn x\nreturn y", "return x") == 1
    assert score("code_edit", "```python\n# comment\nreturn x\n```", "return x") == 1
    assert score("code_edit", "// comment\nreturn x;", "return x;") == 1
    assert score("code_edit", "return x  # what we want\nreturn y", "return y") == 1  # a mark anywhere in the line
    assert score("code_edit", "# nothing else", "return x") == 0
    assert score("code_edit", "", "return x") == 0
    assert score("code_edit", "return z", "return x", "return zz") == pytest.approx(0.94)


BODY = "    total = 0\n    for x in xs:\n        total += x\n    return total\n"


def test_bodies_end_at_the_next_definition() -> None:
    assert score("code_block", BODY, BODY) == 1
    assert score("code_block", BODY + "\n\ndef other(xs):\n    return 0\n", BODY) == 1
    assert score("code_block", BODY + "\nprint(add([1]))\n", BODY) == 1
    assert score("code_block", "\n" + BODY.replace("\n", "  \n\n"), BODY) == 1  # blanks and empty lines aside
    assert 0.8 < score("code_block", BODY.replace("total", "sum"), BODY) < 1


def test_fences_are_opened() -> None:
    assert score("code_block", f"Here it is:\n```python\n{BODY}```\nDone.", BODY) == 1
    assert score("code_block", f"```\n{BODY}", BODY) == 1


def test_a_reference_may_have_definitions_itself() -> None:
    whole = f"import math\ndef add(xs):\n{BODY}def twice(x):\n    return 2 * x"
    assert score("code_block", whole + "\n\n\ndef third():\n    pass", whole) == 1
