"""Perplexity of books: a passage is the context, what follows it is to be predicted.

The scorer is "perplexity": the runner takes the likelihood of the gold continuation instead of generating.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvthrift.errors import ContextError
from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks.fit import SEAM, Room, at_least
from kvthrift.eval.tasks.haystack import books

SCORER = "perplexity"


@dataclass(frozen=True)
class Books(Task):
    """Passages of the data folder's books, else of the shipped one, from anywhere in them.

    Attributes:
        continuation: tokens to predict.
    """

    name = "perplexity.books"
    group = "perplexity"
    summary = "how well the text after a passage is predicted"

    continuation: int = 256

    def __post_init__(self) -> None:
        at_least(self, 1, continuation=self.continuation)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        context = length - self.continuation - SEAM
        if context < 1:
            raise ContextError(
                f"a length of {length} tokens is too short for task {self.name}, which predicts {self.continuation}. "
                f"Give a length above {self.continuation + SEAM}."
            )
        shelf, room = books(data), Room(tokenizer, length)
        for number in range(count):
            rng = Random(f"{seed}/{self.name}/{number}")
            book = rng.choice(_long_enough(shelf, length))
            ids = _passage(tokenizer, shelf[book], context + self.continuation, rng.random())
            yield self._sample(number, room, ids, book)

    def _sample(self, number: int, room: Room, ids: list[int], book: str) -> Sample:
        """The last ids are to be predicted; a book that is too short is a shorter context."""
        start, middle = 0, len(ids) - self.continuation
        sample = self._built(number, room, ids[:middle], ids[middle:], book)
        while room.left(sample) < 0:  # text that is decoded and encoded again may take a token more
            start += 1
            sample = self._built(number, room, ids[start:middle], ids[middle:], book)
        return sample

    def _built(self, number: int, room: Room, before: list[int], after: list[int], book: str) -> Sample:
        decode = room.tokenizer.decode
        gold = decode(after)
        turn = Turn("", (gold,), "", max(room.tokens(gold), len(after)))
        meta = {"book": book, "length": room.length}
        return Sample(f"{room.length}-{number:04d}", self.name, decode(before), (turn,), SCORER, chat=False, meta=meta)


def _long_enough(shelf: Mapping[str, str], tokens: int) -> list[str]:
    """Names of the books that have about that many tokens; the longest's where none has."""
    letters = {name: len(text) for name, text in sorted(shelf.items())}
    longest = max(letters.values())
    return [name for name in letters if letters[name] >= min(5 * tokens, longest)]


def _passage(tokenizer: Tokenizer, text: str, tokens: int, share: float) -> list[int]:
    """Ids of that many tokens of a text from a share of it on; fewer where it has no more."""
    letters = 4 * tokens
    while True:
        start = text.find(" ", int(share * max(len(text) - letters, 0)))
        ids = tokenizer.encode(text[max(start, 0) : start + letters])
        if len(ids) >= tokens or letters >= len(text):
            return ids[:tokens]
        letters *= 2


TASKS = (Books,)
