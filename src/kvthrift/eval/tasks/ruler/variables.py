"""RULER's variable tracking: a chain of assignments hidden in noise, after one solved example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from string import ascii_uppercase

from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks.fit import Room, filled
from kvthrift.eval.tasks.haystack import FILLER, insert
from kvthrift.eval.tasks.ruler.base import SHORTEST, Ruler
from kvthrift.eval.tasks.words import digits

HOPS = 4
EXAMPLE_TOKENS = 500


def names(rng: Random, count: int, letters: int) -> list[str]:
    """Different variable names of capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return list(found)


def chain(variables: list[str], value: str) -> list[str]:
    """The assignments that give every variable the value, in order."""
    links = (f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(variables))
    return [f"VAR {variables[0]} = {value}", *links]


def hidden(rng: Random, lines: int, assignments: list[str]) -> str:
    """Lines of noise with the assignments in between, in order."""
    return "\n".join(insert([FILLER] * lines, assignments, sorted(rng.sample(range(lines), len(assignments)))))


class Variables(Ruler):
    """One chain of four hops: find all five variables that hold a value."""

    name = "ruler.vt"
    summary = "the five variables that a chain of assignments gives one value"
    new_tokens = 30
    asks = ("Question: Which variables",)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        room = self.room(tokenizer, length)
        lines = self._example_lines(room, seed)

        def make(number: int, units: int) -> Sample:
            rng = self.rng(seed, number)
            solved, start, found = self._prompt(rng, lines, letters=3)
            prompt, prefix, answers = self._prompt(rng, units, letters=5)
            example = f"{solved}{start} {' '.join(found)}\n\n"
            return self.sample(number, length, example + prompt, prefix, answers, haystack="noise")

        yield from filled(make, room, count=count, step=10 if length >= SHORTEST else 5, least=HOPS + 1)

    def _prompt(self, rng: Random, lines: int, letters: int) -> tuple[str, str, list[str]]:
        """The prompt, the start of its answer, and the variables asked for."""
        variables, value = names(rng, HOPS + 1, letters), digits(rng, 5)
        text = hidden(rng, lines, chain(variables, value))
        statement = "Follow the variable assignments hidden in the text below and remember them."
        ask = f"Question: Which variables in the text above are assigned the value {value}?"
        say = f" Answer: By the assignments in the text above, {HOPS + 1} variables hold the value {value}. They are:"
        return f"{statement}\n\n{text}\n{ask}", say, variables

    def _example_lines(self, room: Room, seed: int) -> int:
        """Lines of noise that bring the solved example to about 500 tokens."""
        lines = HOPS + 1
        while room.tokens("".join(self._prompt(self.rng(seed, 0), lines + 1, 3)[:2])) <= EXAMPLE_TOKENS:
            lines += 1
        return lines


TASKS = (Variables,)
