"""RULER's eight needle tasks: keys and values hidden in noise, in an essay, or among other needles.

Needles go to sentence boundaries of an essay, at depths drawn from a grid of 40, and to random lines of anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks.fit import filled
from kvthrift.eval.tasks.haystack import FILLER, essays, insert, sentences
from kvthrift.eval.tasks.ruler.base import SHORTEST, Ruler
from kvthrift.eval.tasks.words import distinct

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the essay's sentences that may stand before a needle."""


@dataclass(frozen=True)
class Hidden:
    """What one sample hides: sentences, all their keys and values, the keys it asks for, and their values."""

    needles: list[str]
    strings: set[str]
    queries: list[str]
    answers: list[str]


def needle(kind: str, key: str, value: str) -> str:
    """One needle."""
    return f"A special magic {kind} for {key} is: {value}."


class Needles(Ruler):
    """Needles in a haystack: the class attributes say which, how many, and in what."""

    new_tokens = 128
    asks = ("What is the special magic", "What are all the special magic")
    hay: ClassVar[str] = "essay"  # or "noise", "needle"
    key: ClassVar[str] = "word"
    value: ClassVar[str] = "number"
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 1  # of each key
    asked: ClassVar[int] = 1  # keys

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        prose, source = essays(data) if self.hay == "essay" else ("", self.hay)
        words = prose.split()

        def make(number: int, units: int) -> Sample:
            rng = self.rng(seed, number)
            hidden = self._hide(rng)
            text, depths = self._haystack(rng, hidden, words, units)
            places = [depths[which] for which, line in enumerate(hidden.needles) if hidden.answers[0] in line]
            return self._ask(number, length, text, hidden, haystack=source, depth=places[0], depths=depths)

        yield from filled(
            make, self.room(tokenizer, length), count=count, step=self._step(length), least=self.keys * self.values
        )

    def _step(self, length: int) -> int:
        if self.hay == "essay":
            return 500 if length >= SHORTEST else 50
        return 25 if length >= SHORTEST else 5

    def _hide(self, rng: Random) -> Hidden:
        keys = distinct(rng, self.key, self.keys)
        drawn = distinct(rng, self.value, self.keys * self.values)
        values = {key: drawn[at * self.values : (at + 1) * self.values] for at, key in enumerate(keys)}
        needles = [needle(self.value, key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        queries = rng.sample(keys, self.asked)
        return Hidden(needles, {*keys, *drawn}, queries, [value for key in queries for value in values[key]])

    def _haystack(self, rng: Random, hidden: Hidden, words: list[str], units: int) -> tuple[str, list[float]]:
        """The context, and the depth of each needle, 0 to 1."""
        if self.hay == "essay":
            return _in_essay(rng, hidden.needles, words, units)
        if self.hay == "noise":
            lines = [FILLER] * units
        else:
            keys, values = (distinct(rng, kind, units, hidden.strings) for kind in (self.key, self.value))
            lines = [needle(self.value, key, value) for key, value in zip(keys, values, strict=True)]
        places = sorted(rng.sample(range(units), len(hidden.needles)))
        return "\n".join(insert(lines, hidden.needles, places)), [place / units for place in places]

    def _ask(self, number: int, length: int, text: str, hidden: Hidden, **meta: object) -> Sample:
        *first, last = hidden.queries
        query = f"{', '.join(first)}, and {last}" if first else last
        if len(hidden.answers) == 1:
            one, what = f"A special magic {self.value} is", f"special magic {self.value} for {query}"
            ask, say, recall = f"What is the {what}", f"The {what} in the text above is", "it"
        else:
            one, what = f"Some special magic {self.value}s are", f"special magic {self.value}s for {query}"
            ask, say, recall = f"What are all the {what}", f"The {what} in the text above are", "them"
        statement = f"{one} hidden in the text below. Remember {recall}, for you will be asked about {recall} later."
        prompt = f"{statement}\n{text}\n{ask} in the text above?"
        return self.sample(number, length, prompt, f" {say}", hidden.answers, **meta)


def _in_essay(rng: Random, needles: list[str], words: list[str], units: int) -> tuple[str, list[float]]:
    """The first ``units`` words of an essay, repeated where it is too short, with the needles between sentences."""
    repeats = -(-units // len(words))
    parts = sentences(" ".join((words * repeats)[:units]))
    depths = sorted(depth / 100 for depth in rng.sample(DEPTHS, len(needles)))
    places = [int(len(parts) * depth) for depth in depths]
    return " ".join(insert(parts, needles, places)), depths


class Single1(Needles):
    name = "ruler.niah_single_1"
    summary = "one word -> number in repeated noise"
    hay = "noise"


class Single2(Needles):
    name = "ruler.niah_single_2"
    summary = "one word -> number in an essay"


class Single3(Needles):
    name = "ruler.niah_single_3"
    summary = "one word -> uuid in an essay"
    value = "uuid"


class MultiKey1(Needles):
    name = "ruler.niah_multikey_1"
    summary = "one of four word -> number pairs in an essay"
    keys = 4


class MultiKey2(Needles):
    name = "ruler.niah_multikey_2"
    summary = "one word -> number pair among nothing but others"
    hay = "needle"


class MultiKey3(Needles):
    name = "ruler.niah_multikey_3"
    summary = "one uuid -> uuid pair among nothing but others"
    hay, key, value = "needle", "uuid", "uuid"


class MultiValue(Needles):
    name = "ruler.niah_multivalue"
    summary = "all four numbers of one word in an essay"
    values = 4


class MultiQuery(Needles):
    name = "ruler.niah_multiquery"
    summary = "the numbers of all four words in an essay"
    keys = asked = 4


TASKS = (Single1, Single2, Single3, MultiKey1, MultiKey2, MultiKey3, MultiValue, MultiQuery)
