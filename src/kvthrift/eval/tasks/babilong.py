"""BABILong (2406.10149): a bAbI story whose sentences are scattered over a book, and a question about it.

All twenty of bAbI; BABILong reports the first ten. Prompts are our own, with two solved stories of the same file in
front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import ClassVar

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, filled
from kvthrift.eval.tasks.haystack import books, flat, insert, sentences

_GET = "the English bAbI tasks v1.2 (tasks_1-20_v1-2/en)"
_EXAMPLES = 2
_KEPT = 50  # questions at the end of the file that examples come from, never asked


@dataclass(frozen=True)
class Story:
    """Facts, a question about them, its answer, and which facts support it (places from 0)."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def stories(lines: str) -> Iterator[Story]:
    """Every question of a bAbI file with the facts before it."""
    facts: dict[str, str] = {}
    for line in lines.splitlines():
        number, _, rest = line.strip().partition(" ")
        if number == "1":
            facts = {}
        if "\t" not in rest:
            facts[number] = rest
            continue
        question, answer, support = (part.strip() for part in rest.split("\t"))
        order = list(facts)
        found = tuple(order.index(number) for number in support.split())
        yield Story(tuple(facts.values()), question, answer, found)


class _Pages:
    """The sentences of books, read as they are needed."""

    def __init__(self, shelf: Mapping[str, str]) -> None:
        self._shelf, self._names = shelf, sorted(shelf)
        self._read: dict[str, list[str]] = {}

    def take(self, rng: Random, count: int) -> list[str]:
        """``count`` sentences in a row from anywhere in any book, on into the next books where it ends."""
        at = rng.randrange(len(self._names))
        found = self._of(at)
        found = found[rng.randrange(len(found)) :]
        while len(found) < count:
            at = (at + 1) % len(self._names)
            found = found + self._of(at)
        return found[:count]

    def _of(self, at: int) -> list[str]:
        name = self._names[at]
        if name not in self._read:
            self._read[name] = sentences(flat(self._shelf[name]))
        return self._read[name]


class BabiLong(Task):
    """One bAbI task in a book."""

    group = "babilong"
    file: ClassVar[str]
    hint: ClassVar[str]
    words: ClassVar[Mapping[str, str]] = {}  # what the file's answers are short for

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        found = list(stories(local.text(local.find(data, f"babi/{self.file}_test.txt", get=_GET))))
        if self.words:
            found = [replace(story, answer=_spelled(story.answer, self.words)) for story in found]
        labels = tuple(sorted({part for story in found for part in story.answer.split(",")}))
        asked, kept = found[:-_KEPT], found[-_KEPT:]
        head = self._head(sorted(kept, key=lambda story: len(story.facts))[:_EXAMPLES])
        order = Random(f"{seed}/{self.name}").sample(range(len(asked)), len(asked))
        pages = _Pages(books(data))

        def make(number: int, units: int) -> Sample:
            rng = Random(f"{seed}/{self.name}/{order[number]}")
            story = asked[order[number]]
            text = pages.take(rng, units)
            places = sorted(rng.randrange(units + 1) for _ in story.facts)
            context = f"{head} {' '.join(insert(text, story.facts, places))}"
            depths = [places[fact] / units for fact in story.support]
            return self._sample(str(order[number]), context, story, labels=labels, depths=depths, length=length)

        yield from filled(make, Room(tokenizer, length), count=count, items=len(order))

    def _head(self, solved: list[Story]) -> str:
        """The prompt before the text, solved stories included."""
        told = (f"Text: {' '.join(s.facts)}\nQuestion: {s.question}\nAnswer: {s.answer}" for s in solved)
        statement = f"Facts are hidden in a text about other things. {self.hint} Examples without the other things:"
        return "\n\n".join([statement, *told, "Text:"])

    def _sample(self, name: str, context: str, story: Story, **meta: object) -> Sample:
        turn = Turn(f"\nQuestion: {story.question}\n", (story.answer,), "Answer:", 12)
        return Sample(name, self.name, context, (turn,), "only_label", meta=meta)


def _spelled(answer: str, words: Mapping[str, str]) -> str:
    return " ".join(words[part] for part in answer.split(","))


_WHERE = "Answer with the name of the place."


class Qa1(BabiLong):
    name, file = "babilong.qa1", "qa1_single-supporting-fact"
    summary, hint = "one supporting fact", _WHERE


class Qa2(BabiLong):
    name, file = "babilong.qa2", "qa2_two-supporting-facts"
    summary, hint = "two supporting facts", _WHERE


class Qa3(BabiLong):
    name, file = "babilong.qa3", "qa3_three-supporting-facts"
    summary, hint = "three supporting facts", _WHERE


class Qa4(BabiLong):
    name, file = "babilong.qa4", "qa4_two-arg-relations"
    summary, hint = "where places lie", _WHERE


class Qa5(BabiLong):
    name, file = "babilong.qa5", "qa5_three-arg-relations"
    summary, hint = "who gave what to whom", "Answer with one name or thing."


class Qa6(BabiLong):
    name, file = "babilong.qa6", "qa6_yes-no-questions"
    summary, hint = "yes or no", "Answer yes or no."


class Qa7(BabiLong):
    name, file = "babilong.qa7", "qa7_counting"
    summary, hint = "how many things", "Answer with a number word."


class Qa8(BabiLong):
    name, file = "babilong.qa8", "qa8_lists-sets"
    summary, hint = "which things", "Answer with the things, parted by commas, or nothing."


class Qa9(BabiLong):
    name, file = "babilong.qa9", "qa9_simple-negation"
    summary, hint = "yes or no, with negation", "Answer yes or no."


class Qa10(BabiLong):
    name, file = "babilong.qa10", "qa10_indefinite-knowledge"
    summary, hint = "yes, no or maybe", "Answer yes, no or maybe."


class Qa11(BabiLong):
    name, file = "babilong.qa11", "qa11_basic-coreference"
    summary, hint = "he and she", _WHERE


class Qa12(BabiLong):
    name, file = "babilong.qa12", "qa12_conjunction"
    summary, hint = "two persons in one fact", _WHERE


class Qa13(BabiLong):
    name, file = "babilong.qa13", "qa13_compound-coreference"
    summary, hint = "they", _WHERE


class Qa14(BabiLong):
    name, file = "babilong.qa14", "qa14_time-reasoning"
    summary, hint = "where somebody was before", _WHERE


class Qa15(BabiLong):
    name, file = "babilong.qa15", "qa15_basic-deduction"
    summary, hint = "deduction", "Answer with the name of the animal."


class Qa16(BabiLong):
    name, file = "babilong.qa16", "qa16_basic-induction"
    summary, hint = "induction", "Answer with the name of the colour."


class Qa17(BabiLong):
    name, file = "babilong.qa17", "qa17_positional-reasoning"
    summary, hint = "yes or no, on where things lie", "Answer yes or no."


class Qa18(BabiLong):
    name, file = "babilong.qa18", "qa18_size-reasoning"
    summary, hint = "yes or no, on what fits into what", "Answer yes or no."


class Qa19(BabiLong):
    """Two steps whose order matters, so the whole way is the answer that is looked for, not its parts."""

    name, file = "babilong.qa19", "qa19_path-finding"
    summary, hint = "the way, in two steps", "Answer with the two directions in order, such as: north east."
    words: ClassVar[Mapping[str, str]] = {"n": "north", "s": "south", "e": "east", "w": "west"}


class Qa20(BabiLong):
    name, file = "babilong.qa20", "qa20_agents-motivations"
    summary, hint = "what somebody does, and why", "Answer with one word."


TASKS = (
    Qa1, Qa2, Qa3, Qa4, Qa5, Qa6, Qa7, Qa8, Qa9, Qa10, Qa11, Qa12, Qa13, Qa14, Qa15, Qa16, Qa17, Qa18, Qa19, Qa20,
)  # fmt: skip
