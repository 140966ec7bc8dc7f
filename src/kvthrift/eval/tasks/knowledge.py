"""Multiple choice: CommonsenseQA and MMLU after a few solved questions.

``meta["choices"]`` has the letters, for runs that compare likelihoods instead of reading an answer.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvthrift.errors import DataError
from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled

_MMLU = "mmlu/mmlu-test-dev.tar.xz"
_CSQA = "commonsenseqa-100/CommonsenseQA_dev_rand_split.jsonl"


@dataclass(frozen=True)
class Item:
    """A question, its choices, and the letter of the right one."""

    id: str
    question: str
    choices: tuple[str, ...]
    letter: str
    subject: str = ""

    @property
    def text(self) -> str:
        """The question with its choices, one a line."""
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDEFGH", self.choices, strict=False))
        return f"Question: {self.question}\n{listed}"


@dataclass(frozen=True)
class Choice(Task):
    """A question with lettered choices after solved ones.

    Attributes:
        shots: solved questions in front.
    """

    group = "choice"

    shots: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, shots=self.shots)

    def read(self, data: Path | None) -> tuple[list[Item], list[Item]]:
        """Questions to ask, and questions to show."""
        raise NotImplementedError

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        asked, shown = self.read(data)
        Random(f"{seed}/{self.name}").shuffle(asked)

        def make(number: int, units: int) -> Sample:
            item = asked[number]
            same = [other for other in shown if other.subject == item.subject]
            return self._sample(item, same[: self.shots])

        yield from filled(make, Room(tokenizer, length), count=count, most=1, items=len(asked))

    def _sample(self, item: Item, shots: list[Item]) -> Sample:
        about = f" about {item.subject.replace('_', ' ')}" if item.subject else ""
        statement = f"These are multiple choice questions{about}. Answer each with the letter of the right choice."
        shown = "".join(f"{shot.text}Answer: {shot.letter}\n\n" for shot in shots)
        turn = Turn(item.text, (item.letter,), "Answer:", 4)
        meta = {"choices": tuple("ABCDEFGH"[: len(item.choices)]), "shots": len(shots)}
        if item.subject:
            meta["subject"] = item.subject
        return Sample(item.id, self.name, f"{statement}\n\n{shown}", (turn,), "choice", meta=meta)


class CommonsenseQA(Choice):
    """Questions of common sense; the last 20 of the file are the solved ones."""

    name = "choice.commonsenseqa"
    summary = "common sense with five choices"

    def read(self, data: Path | None) -> tuple[list[Item], list[Item]]:
        path = local.find(data, _CSQA, "commonsenseqa/dev_rand_split.jsonl", get="CommonsenseQA's dev_rand_split.jsonl")
        items = [_commonsense(row) for row in local.rows(path)]
        return items[:-20], items[-20:]


def _commonsense(row: local.Row) -> Item:
    asked = row["question"]
    return Item(row["id"], asked["stem"], tuple(choice["text"] for choice in asked["choices"]), row["answerKey"])


class Mmlu(Choice):
    """57 subjects; the solved questions are the dev set's of the same subject."""

    name = "choice.mmlu"
    summary = "57 subjects with four choices"

    def read(self, data: Path | None) -> tuple[list[Item], list[Item]]:
        path = local.find(data, _MMLU, get="MMLU's test and dev folders as mmlu-test-dev.tar.xz")
        parts: dict[str, list[Item]] = {"test": [], "dev": []}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    split, _, name = member.name.removeprefix("mmlu/").partition("/")
                    if file and split in parts:
                        parts[split] += _sheet(name, file.read().decode("utf-8"))
        except (tarfile.TarError, OSError, EOFError, IndexError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}), so its task has no samples. Get the file again."
            ) from error
        return parts["test"], parts["dev"]


def _sheet(name: str, text: str) -> Iterator[Item]:
    """One subject's questions: a header, then question, four choices, and the number of the right one."""
    subject = name.rsplit("_", 1)[0]
    for number, cells in enumerate(list(csv.reader(io.StringIO(text)))[1:]):
        yield Item(f"{subject}-{number}", cells[0], tuple(cells[1:5]), "ABCD"[int(cells[5])], subject)


TASKS = (CommonsenseQA, Mmlu)
