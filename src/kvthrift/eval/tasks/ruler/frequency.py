"""RULER's two counting tasks: the common words of a list, the frequent words of a coded text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase

from kvthrift.errors import ContextError
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks.fit import filled
from kvthrift.eval.tasks.ruler.base import SHORTEST, Ruler
from kvthrift.eval.tasks.words import many_words, sample_words

COMMON = 10
ALPHA = 2.0
DOTS = "..."
LEAST_CODED = 100  # words; with fewer, the fourth and fifth rank come equally often


def zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta for alpha > 1: a sum and the integral of its tail."""
    head = math.fsum(math.pow(k, -alpha) for k in range(1, terms))
    return head + math.pow(terms, 1 - alpha) / (alpha - 1) + math.pow(terms, -alpha) / 2


def numbered(words: list[str]) -> str:
    """ "1. first 2. second"."""
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


class CommonWords(Ruler):
    """The ten words that a shuffled list has 30 times, all others 3 times, after one solved example."""

    name = "ruler.cwe"
    summary = "the ten most common words of a numbered list"
    new_tokens = 120
    asks = ("Question: What are the 10 most common words",)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        example, often = ((40, 10, 3), (30, 3)) if length >= SHORTEST else ((20, 3, 1), (6, 1))

        def make(number: int, units: int) -> Sample:
            rng = self.rng(seed, number)
            solved, start, found = self._prompt(rng, *example)
            prompt, prefix, answers = self._prompt(rng, units, *often)
            text = f"{solved}{start} {numbered(found)}\n{prompt}"
            return self.sample(number, length, text, prefix, answers, words=units)

        room = self.room(tokenizer, length)
        yield from filled(make, room, count=count, step=10, least=COMMON + 1, most=len(many_words()))

    def _prompt(self, rng: Random, words: int, common: int, rare: int) -> tuple[str, str, list[str]]:
        """The prompt, the start of its answer, and the common words."""
        drawn = sample_words(rng, words)
        listed = drawn[:COMMON] * common + drawn[COMMON:] * rare
        rng.shuffle(listed)
        statement = (
            "Below is a numbered list of words, some of which appear more often than others. "
            "Remember the ones that appear most often."
        )
        ask = "Question: What are the 10 most common words in the list above?"
        say = " Answer: The 10 words that appear most often in the list are:"
        return f"{statement}\n{numbered(listed)}\n{ask}", say, drawn[:COMMON]


class FrequentWords(Ruler):
    """Made-up words, the k-th of which makes up k^-2 / zeta(2) of the text; dots hold the first rank."""

    name = "ruler.fwe"
    summary = "the three most frequent words of a coded text"
    new_tokens = 50
    asks = ("Question: Without any explanation",)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        if length // 50 < COMMON:
            raise ContextError(
                f"a length of {length} tokens is too short for task {self.name}: its vocabulary is length/50 words. "
                f"Give a length of {50 * COMMON} or more."
            )
        norm = zeta(ALPHA)

        def make(number: int, units: int) -> Sample:
            rng = self.rng(seed, number)
            ranked = [DOTS, *_coded(rng, length // 50 - 1)]
            words = [word for rank, word in enumerate(ranked, 1) for _ in range(int(units * rank**-ALPHA / norm))]
            rng.shuffle(words)
            return self._ask(number, length, " ".join(words), ranked[1:4], words=len(words))

        room = self.room(tokenizer, length)
        yield from filled(make, room, count=count, step=max(length // 32, 1), least=LEAST_CODED)

    def _ask(self, number: int, length: int, text: str, answers: list[str], words: int) -> Sample:
        statement = (
            "Read the coded text below and keep count of each coded word. Find the three coded words that appear "
            "most often."
        )
        ask = (
            f"Question: Without any explanation, and leaving the dots '{DOTS}' aside, what are the three most frequent "
            "words in the coded text above?"
        )
        say = " Answer: In the coded text above, the three most frequent words are:"
        return self.sample(number, length, f"{statement} {text}\n{ask}", say, answers, words=words)


def _coded(rng: Random, count: int) -> list[str]:
    """Different made-up words of six letters, in random order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(ascii_lowercase, k=6))] = None
    return list(found)


TASKS = (CommonWords, FrequentWords)
