"""Needle in a haystack: one needle at every depth of a grid, in filler lines or in a book.

A grid over lengths is several runs with other lengths; ``meta`` has each sample's length and depth for the heat map,
and the share of tokens that really stand before the needle.
Seven digits can come out before anything is dropped, so that 64 digits and a uuid are needles too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from kvthrift.errors import ContextError
from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks.fit import Room, at_least, too_short
from kvthrift.eval.tasks.haystack import FILLER, boundary, essays, flat, insert, sentences, spread
from kvthrift.eval.tasks.words import digits, pair, random_uuid


@dataclass(frozen=True)
class Hay:
    """A haystack cut to units, each with its tokens, and what joins them."""

    units: list[str]
    tokens: list[int]
    joint: str
    source: str

    def first(self, room: int) -> int:
        """How many units fit into that many tokens."""
        return max(boundary(self.tokens, min(room / max(sum(self.tokens), 1), 1.0)), 0)


@dataclass(frozen=True)
class Needle(Task):
    """One needle in a haystack.

    Attributes:
        haystack: "book" (the data folder's essays, else the shipped book) or "filler" (the same line again and again).
        depths: points of the grid of depths, both ends included.
    """

    group = "niah"
    scorer: ClassVar[str] = "substring"
    new_tokens: ClassVar[int] = 32
    buffer: ClassVar[int] = 0  # tokens kept free for all but the haystack, at least

    haystack: Literal["book", "filler"] = "book"
    depths: int = 11

    def __post_init__(self) -> None:
        at_least(self, 1, depths=self.depths)

    def hide(self, rng: Random) -> tuple[str, str, str, str]:
        """A needle, the question for it, the start of the answer, and the answer."""
        raise NotImplementedError

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        room = Room(tokenizer, length)
        hay = self._hay(room, data)
        for number in range(count):
            rng = Random(f"{seed}/{self.name}/{number}")
            yield self._sample(number, room, hay, self.hide(rng))

    def _hay(self, room: Room, data: Path | None) -> Hay:
        """More of the haystack than ever fits."""
        filler = self.haystack == "filler"
        prose, source = (FILLER, "filler") if filler else essays(data)
        joint, parts = ("\n", [prose]) if filler else (" ", sentences(flat(prose)))
        known = cache(room.tokens)  # haystacks come round
        units: list[str] = []
        tokens: list[int] = []
        left = room.length
        for part in cycle(parts):
            if left <= 0:
                break
            units.append(part)
            tokens.append(known(joint + part))
            left -= tokens[-1]
        return Hay(units, tokens, joint, source)

    def _sample(self, number: int, room: Room, hay: Hay, hidden: tuple[str, str, str, str]) -> Sample:
        build = partial(self._build, number, room, hay, hidden)
        bare = build(0)
        spent = max(room.spent(bare), self.buffer)
        units = hay.first(room.length - spent)
        if units == 0:
            raise too_short(room, build(1)) if room.left(build(1)) < 0 else _no_room(self, room, spent)
        sample = build(units)
        while room.left(sample) < 0:
            units -= 1
            sample = build(units)
        return sample

    def _build(self, number: int, room: Room, hay: Hay, hidden: tuple[str, str, str, str], units: int) -> Sample:
        needle, question, prefix, answer = hidden
        depth, tokens = spread(number, self.depths), hay.tokens[:units]
        place = boundary(tokens, depth)
        at = sum(tokens[:place]) / max(sum(tokens), 1)
        text = hay.joint.join(insert(hay.units[:units], [needle], [place]))
        return Sample(
            id=f"{room.length}-{number:04d}",
            task=self.name,
            context=f"Read the text and remember what it says.\n\n{text}",
            turns=(Turn(f"\n\n{question}\n", (answer,), prefix, self.new_tokens),),
            scorer=self.scorer,
            meta={"length": room.length, "depth": depth, "at": at, "haystack": hay.source},
        )


def _no_room(task: Needle, room: Room, spent: int) -> ContextError:
    return ContextError(
        f"a length of {room.length} tokens is too short for task {task.name}, which keeps {spent} free for the "
        "question and the answer. Give a longer one."
    )


class _Value(Needle):
    """A needle that says a key's value."""

    what: ClassVar[str]

    def value(self, rng: Random) -> str:
        raise NotImplementedError

    def hide(self, rng: Random) -> tuple[str, str, str, str]:
        key, value = pair(rng), self.value(rng)
        what = f"the special magic {self.what} for {key}"
        return f"{what.capitalize()} is {value}.", f"What is {what}?", f"{what.capitalize()} is", value


class Number(_Value):
    name = "niah.number"
    summary = "a number of 7 digits"
    what = "number"

    def value(self, rng: Random) -> str:
        return digits(rng, 7)


class LongNumber(_Value):
    name = "niah.number64"
    summary = "a number of 64 digits, too long to come out by luck of the first token"
    what = "number"
    new_tokens = 80

    def value(self, rng: Random) -> str:
        return digits(rng, 64)


class Uuid(_Value):
    name = "niah.uuid"
    summary = "a uuid"
    what = "code"
    new_tokens = 64

    def value(self, rng: Random) -> str:
        return random_uuid(rng)


class Sandwich(Needle):
    """Kamradt's needle, scored by ROUGE-1 F1 as papers on caches do; 200 tokens are kept free as he does."""

    name = "niah.sentence"
    summary = "Kamradt's sentence about San Francisco"
    scorer = "rouge_1"
    new_tokens = 30
    buffer = 200

    def hide(self, rng: Random) -> tuple[str, str, str, str]:
        fact = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
        return fact, "What is the best thing to do in San Francisco, by the text above?", "", fact


TASKS = (Number, LongNumber, Uuid, Sandwich)
