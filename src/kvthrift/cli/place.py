"""Where a text stands among the tokens that were read, and which heads hold it. Knows nothing of models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvthrift.errors import ContextError
from kvthrift.eval.probe import Layout

Spans = tuple[tuple[int, int], ...]
AROUND = " \t\n.,;:!?\"'`*()"  # characters around an answer, or a word of it, that are not looked for
SHORTEST = 4  # characters of a piece of an answer that is worth looking for; fewer if it has a digit


@dataclass(frozen=True, eq=False)
class Holders:
    """``[L, H]``: which heads hold all tokens of a place that the text stands at, and which hold any token of one."""

    whole: NDArray[np.bool_]
    part: NDArray[np.bool_]


@dataclass(frozen=True)
class Place:
    """A text and where it stands.

    Attributes:
        text: as it stands there first.
        spans: ``(start, stop)`` in tokens, every place.
        given: whether it was asked for, rather than taken from the full cache's answer.
    """

    text: str
    spans: Spans
    given: bool

    @classmethod
    def given_by(cls, text: str, tokens: Sequence[str]) -> Self:
        """A text that was asked for.

        Raises:
            ContextError: it is empty, or stands nowhere among the tokens.
        """
        if not text.strip():
            raise ContextError(
                "the text to find is empty, so it stands nowhere. Give words with --find, or leave it out."
            )
        found = cls._at(text, tokens, given=True)
        if found is None:
            raise ContextError(
                f"the text to find, {text.strip()!r}, does not stand in what is read and compressed, so no head can "
                "hold it. Give words as they stand there (capitals matter, line breaks do not)."
            )
        return found

    @classmethod
    def of_answer(cls, answer: str, question: str, tokens: Sequence[str]) -> Self | None:
        """The most telling piece of an answer that stands among the tokens; None if none does.

        A run of words tells more the rarer they are in the text; those of the question tell nothing.
        """
        words, whole = answer.split(), "".join(tokens)
        counts = Counter(word.strip(AROUND) for word in whole.split())
        asked = {word.strip(AROUND).casefold() for word in question.split()}
        total = sum(counts.values())

        def telling(run: list[str]) -> float:
            bare = [word.strip(AROUND) for word in run]
            return sum(log(total / max(counts[word], 1)) for word in bare if word and word.casefold() not in asked)

        best, most = "", 0.0
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                run = " ".join(words[start:stop]).strip(AROUND)
                if not run or not re.search(_pattern(run, given=False), whole):
                    break
                if telling(words[start:stop]) > most and (len(run) >= SHORTEST or re.search(r"\d", run)):
                    best, most = run, telling(words[start:stop])
        return cls._at(best, tokens, given=False) if best else None

    @classmethod
    def _at(cls, text: str, tokens: Sequence[str], *, given: bool) -> Self | None:
        whole = "".join(tokens)
        matches = list(re.finditer(_pattern(text, given=given), whole))
        if not matches:
            return None
        ends = np.array(list(accumulate(map(len, tokens))))
        starts = np.concatenate(([0], ends[:-1]))
        reach = np.where(starts == ends, ends + 1, ends)  # a token without text is part of the next one's character
        spans = []
        for match in matches:
            inside = np.flatnonzero((starts < match.end()) & (reach > match.start()))
            spans.append((int(inside[0]), int(inside[-1]) + 1))
        return cls(matches[0].group(), tuple(spans), given)

    def held(self, layout: Layout) -> Holders:
        """Who holds it."""
        kept = [layout.kept[:, :, start:stop] for start, stop in self.spans]
        whole = np.any([one.all(axis=-1) for one in kept], axis=0)
        part = np.any([one.any(axis=-1) for one in kept], axis=0)
        return Holders(whole, part)


def _pattern(text: str, *, given: bool) -> str:
    """The text with any white space between its words; not as part of a longer word unless it was given."""
    words = r"\s+".join(map(re.escape, text.split()))
    return words if given else rf"(?<!\w){words}(?!\w)"
