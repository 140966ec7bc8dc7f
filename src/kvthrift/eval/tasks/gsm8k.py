"""GSM8K (2110.14168) with chains of thought: eight shots, as many shots as fit, and many questions in one prompt.

The eight shots are our own; many-shot prompts take theirs from the end of the data set, which is never asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvthrift.errors import OptionError
from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled
from kvthrift.eval.tasks.worked import WORKED

KEPT = 319  # problems at the end of the data set that shots come from
STATEMENT = "Solve the problems step by step. End each answer with its number."


@dataclass(frozen=True)
class Problem:
    """A question, the reasoning, and the number it comes to."""

    number: int
    question: str
    reasoning: str
    answer: str


def problems(data: Path | None) -> list[Problem]:
    """The test set in its order.

    Raises:
        DataError: it is not there.
    """
    path = local.find(data, "gsm8k/test.jsonl", get="GSM8K's test.jsonl (openai/grade-school-math)")
    found = []
    for number, row in enumerate(local.rows(path)):
        reasoning, _, answer = re.sub(r"<<.*?>>", "", row["answer"]).partition("####")
        found.append(Problem(number, row["question"], reasoning.strip(), answer.strip().replace(",", "")))
    return found


def asked(data: Path | None, seed: int, name: str) -> tuple[list[Problem], list[Problem]]:
    """Problems to ask in the seed's order, and problems to show."""
    found = problems(data)
    head, tail = found[:-KEPT], found[-KEPT:]
    Random(f"{seed}/{name}").shuffle(head)
    return head, tail


def shot(question: str, reasoning: str, answer: str) -> str:
    """One worked problem."""
    return f"Question: {question}\nAnswer: {reasoning} The answer is {answer}.\n\n"


class _Single(Task):
    """One question after worked ones."""

    group = "gsm8k"

    def one(self, problem: Problem, shown: str, new_tokens: int, **meta: object) -> Sample:
        turn = Turn(f"Question: {problem.question}\n", (problem.answer,), "Answer:", new_tokens)
        return Sample(str(problem.number), self.name, f"{STATEMENT}\n\n{shown}", (turn,), "last_number", meta=meta)


@dataclass(frozen=True)
class Thought(_Single):
    """Chain of thought after worked problems.

    Attributes:
        shots: worked problems, 1 to 8.
        answer_tokens: cap of an answer.
    """

    name = "gsm8k.cot"
    summary = "chain of thought after eight worked problems"

    shots: int = 8
    answer_tokens: int = 256

    def __post_init__(self) -> None:
        at_least(self, 1, shots=self.shots, answer_tokens=self.answer_tokens)
        if self.shots > len(WORKED):
            raise OptionError(f"option shots = {self.shots} of task {self.name} is above {len(WORKED)}.")

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        head, _ = asked(data, seed, self.name)
        shown = "".join(shot(*worked) for worked in WORKED[: self.shots])

        def make(number: int, units: int) -> Sample:
            return self.one(head[number], shown, self.answer_tokens, shots=self.shots)

        yield from filled(make, Room(tokenizer, length), count=count, most=1, items=len(head))


@dataclass(frozen=True)
class ManyShot(_Single):
    """Chain of thought after as many worked problems as fit (KVFundaBench's many-shot form).

    Attributes:
        answer_tokens: cap of an answer.
    """

    name = "gsm8k.many_shot"
    summary = "chain of thought after as many worked problems as fit"

    answer_tokens: int = 256

    def __post_init__(self) -> None:
        at_least(self, 1, answer_tokens=self.answer_tokens)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        head, tail = asked(data, seed, self.name)

        def make(number: int, units: int) -> Sample:
            rng = Random(f"{seed}/{self.name}/{head[number].number}")
            shown = "".join(shot(p.question, p.reasoning, p.answer) for p in rng.sample(tail, units))
            return self.one(head[number], shown, self.answer_tokens, shots=units)

        room = Room(tokenizer, length)
        yield from filled(make, room, count=count, most=len(tail), items=len(head))


@dataclass(frozen=True)
class LongGeneration(Task):
    """K questions in one prompt, answered in order after a worked block of eight (LG-GSM8K).

    Published runs have K = 35 and a cap of 4,096 tokens; K falls with the length, and the cap with K.

    Attributes:
        questions: K at most.
        answer_tokens: cap of all answers at that K.
    """

    name = "gsm8k.long"
    group = "gsm8k"
    summary = "up to 35 numbered questions answered in one go"

    questions: int = 35
    answer_tokens: int = 4096

    def __post_init__(self) -> None:
        at_least(self, 1, questions=self.questions, answer_tokens=self.answer_tokens)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        head, _ = asked(data, seed, self.name)

        def make(number: int, units: int) -> Sample:
            first = number * self.questions
            return self._sample(f"{length}-{number:04d}", (head[first:] + head)[:units], length)

        room = Room(tokenizer, length)
        yield from filled(make, room, count=count, most=min(self.questions, len(head)))

    def _sample(self, name: str, chosen: list[Problem], length: int) -> Sample:
        shown = _block([question for question, _, _ in WORKED], [f"{why} The answer is {x}." for _, why, x in WORKED])
        wanted = _block([problem.question for problem in chosen], [])
        statement = "Answer all the questions in their order, each step by step. End each answer with its number."
        cap = self.answer_tokens * len(chosen) // self.questions
        turn = Turn("\nAnswer all of them.\n", tuple(problem.answer for problem in chosen), "Answer 1:", cap)
        meta = {"questions": len(chosen), "problems": [p.number for p in chosen], "length": length}
        return Sample(name, self.name, f"{statement}\n\n{shown}\n{wanted}", (turn,), "numbered_answers", meta=meta)


def _block(questions: list[str], answers: list[str]) -> str:
    asked = "".join(f"Question {place}: {words}\n" for place, words in enumerate(questions, 1))
    return asked + "".join(f"Answer {place}: {words}\n" for place, words in enumerate(answers, 1))


TASKS = (Thought, ManyShot, LongGeneration)
