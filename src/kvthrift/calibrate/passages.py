"""Plain passages of a text, for measurements that need no answer. Knows no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvthrift.errors import CalibrationError

LEAST = 64


class Passages:
    """An endless list of passages of one length, cut from a text at random.

    Args:
        encode: the model's tokenizer.
        text: what they are cut from.
        length: tokens of each.
        seed: another one makes other passages.
        start: ids that the tokenizer puts before every text.

    Raises:
        CalibrationError: the passages are too short to measure anything, or the text too short for them.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], text: str, *, length: int, seed: int = 0, start: Sequence[int] = ()
    ) -> None:
        self._ids, self._start = tuple(encode(text)), tuple(start)
        self.length, self.seed = length, seed
        if length < LEAST:
            raise CalibrationError(
                f"passages of {length} tokens are too short to tell anything. Give a length of {LEAST} or more."
            )
        if len(self._ids) + len(self._start) < length:
            raise CalibrationError(
                f"the text has {len(self._ids)} tokens, too few for passages of {length}, so nothing was measured. "
                "Give a longer text or a smaller length."
            )

    def __getitem__(self, number: int) -> tuple[int, ...]:
        room = self.length - len(self._start)
        first = random.Random(f"{self.seed}/passage/{number}").randrange(len(self._ids) - room + 1)
        return self._start + self._ids[first : first + room]
