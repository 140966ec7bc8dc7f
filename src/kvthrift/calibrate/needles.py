"""Needle tests as token ids: a fact hidden in real text, others like it, a question, and the answer.

A test is made by its number alone, so that any run may be cut short, gone on with or made longer. Knows
nothing of models, and of tokenizers only that one turns text into ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvthrift.errors import CalibrationError

Encode = Callable[[str], list[int]]
"""Token ids of a text, special tokens left out."""

DECOYS = 2
LEAST_TEXT = 128  # tokens of real text a test must have, or finding the needle says nothing
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, spread evenly however many are taken

_PLACES = (
    "lighthouse", "harbour", "library", "museum", "bakery", "chapel", "market", "station", "garden", "castle",
    "theatre", "mill", "school", "hospital", "bridge", "brewery", "orchard", "quarry", "abbey", "stadium",
)  # fmt: skip
_WORDS = (
    "amber", "basket", "candle", "desert", "engine", "feather", "guitar", "hammer", "island", "jacket",
    "kettle", "ladder", "marble", "needle", "orange", "pepper", "quartz", "ribbon", "silver", "tiger",
    "umbrella", "velvet", "window", "yellow", "zebra", "anchor", "bottle", "copper", "dragon", "emerald",
    "forest", "glacier",
)  # fmt: skip


@dataclass(frozen=True)
class NeedleTest:
    """One test.

    Attributes:
        prompt: token ids: text with the needle and its decoys in it, then the question.
        answer: token ids that a model that found the needle says next.
        span: first and one-past-last place of the answer in the prompt.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int]


class NeedleTests:
    """An endless list of tests of one length.

    Half of them hide a seven-digit number, half four words; two decoys say the same of other places, so that
    a head has to pick the right one. Over any run of tests the needle's depth is spread evenly.

    Args:
        encode: the model's tokenizer.
        text: what the needles are hidden in, paragraphs parted by empty lines.
        length: tokens of each prompt.
        seed: another one makes other tests.
        start: ids that the tokenizer puts before every text.

    Raises:
        CalibrationError: the prompts are too short to test anything, or the text too short to fill them.
    """

    def __init__(self, encode: Encode, text: str, *, length: int, seed: int = 0, start: Sequence[int] = ()) -> None:
        self._encode, self._start = encode, tuple(start)
        self.length, self.seed = length, seed
        self._paragraphs = [tuple(encode(f"{part.strip()}\n\n")) for part in text.split("\n\n") if part.strip()]
        self._check(sum(map(len, self._paragraphs)))

    def __getitem__(self, number: int) -> NeedleTest:
        rng = random.Random(f"{self.seed}/{number}")
        kind = ("number", "phrase")[number % 2]
        places = rng.sample(_PLACES, 1 + DECOYS)
        facts = [self._fact(kind, place, rng) for place in places]
        answer = facts[0][1]
        question = self._question(kind, places[0])
        around = len(self._start) + len(question) + sum(len(piece) for fact in facts for piece in fact)
        room = self.length - around
        paragraphs = self._slice(room, rng)
        depths = [(number + 1) * _GOLDEN % 1, *(rng.random() for _ in range(DECOYS))]
        prompt, at = self._hide(paragraphs, facts, [depth * room for depth in depths])
        begin = at + len(facts[0][0])
        return NeedleTest((*prompt, *question), answer, (begin, begin + len(answer)))

    def _fact(self, kind: str, place: str, rng: random.Random) -> tuple[tuple[int, ...], ...]:
        """A fact before its answer, the answer, and what follows."""
        value = str(rng.randrange(10**6, 10**7)) if kind == "number" else " ".join(rng.sample(_WORDS, 4))
        pieces = (f"The secret {kind} of the {place} is", f" {value}", ".\n\n")
        return tuple(tuple(self._encode(piece)) for piece in pieces)

    def _question(self, kind: str, place: str) -> tuple[int, ...]:
        what = f"secret {kind} of the {place}"
        return tuple(self._encode(f"\n\nQuestion: What is the {what}?\nAnswer: The {what} is"))

    def _slice(self, room: int, rng: random.Random) -> list[tuple[int, ...]]:
        """Paragraphs in a row of ``room`` tokens in all, the last of them cut."""
        left = list(accumulate(reversed([len(p) for p in self._paragraphs])))[::-1]  # tokens from each one on
        first = rng.randrange(sum(tokens >= room for tokens in left))
        out: list[tuple[int, ...]] = []
        while room > 0:
            out.append(self._paragraphs[first][:room])
            room -= len(out[-1])
            first += 1
        return out

    def _hide(
        self, paragraphs: list[tuple[int, ...]], facts: list[tuple[tuple[int, ...], ...]], depths: list[float]
    ) -> tuple[list[int], int]:
        """The text with each fact before the paragraph nearest its depth, and where the first fact begins."""
        begins = [0, *accumulate(map(len, paragraphs[:-1]))]
        gaps = [[abs(begin - depth) for begin in begins] for depth in depths]
        slots = [gap.index(min(gap)) for gap in gaps]
        prompt, at = list(self._start), -1
        for number, paragraph in enumerate(paragraphs):
            for which, slot in enumerate(slots):
                if slot == number:
                    at = len(prompt) if which == 0 else at
                    prompt += [token for piece in facts[which] for token in piece]
            prompt += paragraph
        return prompt, at

    def _check(self, tokens: int) -> None:
        rng = random.Random(0)
        longest = max(
            len(self._question(kind, place)) + (1 + DECOYS) * sum(map(len, self._fact(kind, place, rng)))
            for kind in ("number", "phrase")
            for place in _PLACES
        )
        overhead = len(self._start) + longest
        if self.length < overhead + LEAST_TEXT:
            raise CalibrationError(
                f"prompts of {self.length} tokens are too short: a needle test takes {overhead} for its "
                f"facts and question and {LEAST_TEXT} of text to hide them in. Give a length of "
                f"{overhead + LEAST_TEXT} or more."
            )
        if tokens < self.length:
            raise CalibrationError(
                f"the text has {tokens} tokens, too few to fill prompts of {self.length}, so nothing was "
                "measured. Give a longer text or a smaller length."
            )
