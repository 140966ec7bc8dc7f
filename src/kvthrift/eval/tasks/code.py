"""Code completion without running code: HumanEval and MBPP, scored by likeness to the canonical solution.

Not pass@1, which needs the code to be run: for reports of agreement only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled


@dataclass(frozen=True)
class Problem:
    """A prompt and the code that completes it."""

    id: str
    prompt: str
    solution: str


@dataclass(frozen=True)
class Code(Task):
    """A problem after solved ones, which are the data set's first and never asked.

    Attributes:
        shots: solved problems in front.
        answer_tokens: cap of an answer.
    """

    group = "code"

    shots: int = 3
    answer_tokens: int = 256

    def __post_init__(self) -> None:
        at_least(self, 1, shots=self.shots, answer_tokens=self.answer_tokens)

    def problems(self, data: Path | None) -> list[Problem]:
        """The data set in its order."""
        raise NotImplementedError

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        found = self.problems(data)
        shown, asked = found[: self.shots], found[self.shots :]
        Random(f"{seed}/{self.name}").shuffle(asked)
        context = "# Python, one problem after the other.\n\n" + "".join(f"{p.prompt}{p.solution}\n\n" for p in shown)

        def make(number: int, units: int) -> Sample:
            turn = Turn(asked[number].prompt, (asked[number].solution,), "", self.answer_tokens)
            return Sample(asked[number].id, self.name, context, (turn,), "code_block", chat=False)

        yield from filled(make, Room(tokenizer, length), count=count, most=1, items=len(asked))


class HumanEval(Code):
    """The body of a function, from its signature and docstring."""

    name = "code.humaneval"
    summary = "bodies of Python functions from their docstrings"

    def problems(self, data: Path | None) -> list[Problem]:
        path = local.find(data, "humaneval/HumanEval.jsonl", get="HumanEval.jsonl (openai/human-eval)")
        return [Problem(row["task_id"], row["prompt"], row["canonical_solution"].rstrip()) for row in local.rows(path)]


class Mbpp(Code):
    """A function, from a sentence and three tests."""

    name = "code.mbpp"
    summary = "Python functions from a sentence and three tests"

    def problems(self, data: Path | None) -> list[Problem]:
        path = local.find(data, "mbpp/mbpp.jsonl", get="MBPP's mbpp.jsonl (google-research/mbpp)")
        return [_mbpp(row) for row in local.rows(path)]


def _mbpp(row: local.Row) -> Problem:
    tests = "\n".join(row["test_list"])
    code = row["code"].replace("\r\n", "\n").replace("\t", "    ").strip()
    return Problem(str(row["task_id"]), f'"""{row["text"]}\n\n{tests}\n"""\n', code)


TASKS = (HumanEval, Mbpp)
