"""Text to hide things in, and the places where they go.

Haystacks are lists of sentences or lines; a depth is a share of the text before it, 0 to 1. Knows nothing of tasks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import gcd
from pathlib import Path

from kvthrift.data import demo_text
from kvthrift.eval.tasks.local import optional_folder, text

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One line of the classic noise: five short sentences."""

SHIPPED = "alice (public domain)"
"""What reports call the text that comes with the package."""

_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Dr", "St", "Ms"))
_SENTENCE_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][\"'”’)])){_TITLES}\s+(?=[\"'`“‘(]?[A-Z])")  # noqa: RUF001


def sentences(words: str) -> list[str]:
    """A text's sentences, ends included."""
    return [part for part in _SENTENCE_END.split(words.strip()) if part]


def flat(words: str) -> str:
    """A text with every run of white space made one blank."""
    return " ".join(words.split())


class Shelf(Mapping[str, str]):
    """Texts by name, each read when it is first asked for."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths
        self._read: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._read:
            self._read[name] = text(self._paths[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def essays(data: Path | None) -> tuple[str, str]:
    """Modern prose, and what it is called: every text in the data folder's ``essays``, else the shipped book.

    Published needle tests hide their needles in essays that may not be passed on. Put copies of your own into
    ``essays/*.txt`` of the data folder to repeat those; without them the text is the shipped book, and samples say so.
    """
    found = _texts(data, "essays")
    return ("\n\n".join(found.values()), "essays") if found else (demo_text(), SHIPPED)


def books(data: Path | None) -> Mapping[str, str]:
    """Books by name: those in the data folder's ``books``, else the shipped one."""
    return _texts(data, "books") or {SHIPPED: demo_text()}


def _texts(data: Path | None, name: str) -> Shelf:
    home = optional_folder(data)
    paths = sorted((home / name).rglob("*.txt*")) if home else []
    return Shelf({path.name.split(".")[0]: path for path in paths if path.suffix in {".txt", ".gz"}})


def insert(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """The units with each needle before the unit of its place; places are in rising order.

    A place of ``len(units)`` is the very end.
    """
    out: list[str] = []
    last = 0
    for needle, place in zip(needles, places, strict=True):
        out += [*units[last:place], needle]
        last = place
    return out + list(units[last:])


def boundary(tokens: Sequence[int], depth: float) -> int:
    """The place of the last unit boundary at or before a depth, by tokens.

    Args:
        tokens: tokens of each unit.
        depth: share of the text, 0 (before everything) to 1 (the very end).
    """
    ends = list(accumulate(tokens, initial=0))
    return bisect_right(ends, depth * ends[-1] + 1e-9) - 1


def spread(number: int, points: int) -> float:
    """The depth of a sample: all of an even grid in turn, any first few of them far apart.

    Args:
        number: the sample's.
        points: depths in the grid, both ends included.
    """
    if points == 1:
        return 0.5
    stride = round(points * 0.618)
    while gcd(stride, points) != 1:
        stride += 1
    return number * stride % points / (points - 1)
