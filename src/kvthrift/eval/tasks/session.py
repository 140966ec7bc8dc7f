"""Sessions in SCBench's form (2412.10319): one context, five questions in a row.

"multi_turn" questions follow each other, earlier gold answers in between; "multi_request" ones come alone. Made from
nothing (keys and values, variables) or from local paragraphs (questions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain as joined
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks.fit import Make, Room, at_least, filled
from kvthrift.eval.tasks.haystack import FILLER, insert
from kvthrift.eval.tasks.lookup import pairs_text
from kvthrift.eval.tasks.passages import Question, squad
from kvthrift.eval.tasks.ruler.variables import HOPS, chain, names
from kvthrift.eval.tasks.words import distinct


@dataclass(frozen=True)
class Session(Task):
    """A context with several questions.

    Attributes:
        mode: "multi_turn" or "multi_request".
        turns: questions.
    """

    group = "session"
    scorer: ClassVar[str]

    mode: Literal["multi_turn", "multi_request"] = "multi_turn"
    turns: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, turns=self.turns)

    def session(self, name: str, context: str, turns: list[Turn], **meta: object) -> Sample:
        """One sample."""
        return Sample(name, self.name, context, tuple(turns), self.scorer, mode=self.mode, meta=meta)


class KeyValues(Session):
    """Uuid keys and values, as many as fit; each turn asks for one key, from one end of the list to the other."""

    name = "session.kv"
    summary = "five lookups in one list of uuid pairs"
    scorer = "substring"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        def make(number: int, units: int) -> Sample:
            rng = Random(f"{seed}/{self.name}/{number}")
            drawn = distinct(rng, "uuid", 2 * units)
            pairs = list(zip(drawn[:units], drawn[units:], strict=True))
            places = rng.sample(range(units), self.turns)
            turns = [_key_turn(*pairs[place]) for place in places]
            depths = [place / max(units - 1, 1) for place in places]
            context = f"Remember the pairs of the JSON object below.\n\n{pairs_text(pairs)}"
            return self.session(f"{length}-{number:04d}", context, turns, depths=depths, length=length)

        yield from filled(make, Room(tokenizer, length), count=count, least=self.turns)


def _key_turn(key: str, value: str) -> Turn:
    return Turn(f'\n\nWhat is the value of key "{key}"?\n', (value,), "Value:", 64)


class VariableTracking(Session):
    """Several chains of assignments in noise; each turn asks which variables hold one chain's value."""

    name = "session.vt"
    summary = "the variables of five chains of assignments, a chain a turn"
    scorer = "ruler_all"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        def make(number: int, units: int) -> Sample:
            rng = Random(f"{seed}/{self.name}/{number}")
            drawn = names(rng, self.turns * (HOPS + 1), 5)
            groups = [drawn[at : at + HOPS + 1] for at in range(0, len(drawn), HOPS + 1)]
            values = [str(value) for value in rng.sample(range(10_000, 100_000), self.turns)]
            lines = _woven(rng, [chain(group, value) for group, value in zip(groups, values, strict=True)], units)
            context = "Follow the variable assignments in the text below and remember them.\n\n" + "\n".join(lines)
            turns = [_variable_turn(value, group) for value, group in zip(values, groups, strict=True)]
            return self.session(f"{length}-{number:04d}", context, turns, length=length)

        least = self.turns * (HOPS + 1)
        yield from filled(make, Room(tokenizer, length), count=count, least=least)


def _woven(rng: Random, chains: list[list[str]], lines: int) -> list[str]:
    """Noise with every chain in order, the chains among each other at random."""
    turns = [which for which, links in enumerate(chains) for _ in links]
    rng.shuffle(turns)
    left = [iter(links) for links in chains]
    links = [next(left[which]) for which in turns]
    return insert([FILLER] * lines, links, sorted(rng.sample(range(lines), len(links))))


def _variable_turn(value: str, variables: list[str]) -> Turn:
    ask = f"\n\nWhich variables hold the value {value}?\n"
    return Turn(ask, tuple(variables), f"The variables that hold {value} are:", 40)


class Paragraphs(Session):
    """Questions about different paragraphs of one article, among as many other paragraphs as fit."""

    name = "session.qa"
    summary = "five questions over one pile of paragraphs"
    scorer = "qa_f1"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        questions, pool = squad(data)
        sets = _by_article(questions, self.turns, Random(f"{seed}/{self.name}"))
        make = self._maker(sets, pool, seed, length)
        yield from filled(make, Room(tokenizer, length), count=count, most=len(pool), items=len(sets))

    def _maker(self, sets: list[list[Question]], pool: list[str], seed: int, length: int) -> Make:
        def make(number: int, units: int) -> Sample:
            asked = sets[number]
            rng = Random(f"{seed}/{self.name}/{asked[0].id}")
            gold = list(dict.fromkeys(joined.from_iterable(question.gold for question in asked)))
            others = [words for words in pool if words not in gold]
            texts = gold + rng.sample(others, max(units - len(gold), 0))
            rng.shuffle(texts)
            listed = "\n\n".join(f"Paragraph {place}: {words}" for place, words in enumerate(texts, 1))
            turns = [Turn(f"\n\nQuestion: {q.text} Answer in a few words.\n", q.answers, "Answer:", 32) for q in asked]
            context = f"Read the paragraphs and remember what they say.\n\n{listed}"
            return self.session(asked[0].id, context, turns, paragraphs=len(texts), length=length)

        return make


def _by_article(questions: list[Question], turns: int, rng: Random) -> list[list[Question]]:
    """Groups of questions about different paragraphs of one article, each question in one group, shuffled."""
    articles: dict[frozenset[str], list[Question]] = {}
    for question in questions:
        articles.setdefault(frozenset((*question.gold, *question.near)), []).append(question)
    sets: list[list[Question]] = []
    for found in articles.values():
        rng.shuffle(found)
        found.sort(key=lambda question: question.gold)  # keeps the shuffled order within a paragraph
        size = len(found) // turns
        blocks = [found[start * size : (start + 1) * size] for start in range(turns)]
        sets += [list(group) for group in zip(*blocks, strict=True)]
    rng.shuffle(sets)
    return sets


TASKS = (KeyValues, VariableTracking, Paragraphs)
