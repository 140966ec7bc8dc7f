"""Fitting a sample to a length: what it takes in tokens, the largest that fits, and cutting what does not.

A length holds everything a model sees and says: context, questions, starts of answers, answers, and the tokens a chat
template puts around them. Knows nothing of any task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from kvthrift.errors import ContextError, OptionError
from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn

Make = Callable[[int, int], Sample]
"""A sample's number and how many units (words, lines, documents) its context holds -> the sample."""

CHAT_TOKENS = 32  # of a chat template that cannot be asked
PATIENCE = 50  # samples in a row that do not fit, after which a length counts as too short
SEAM = 4  # a special token at the start, and pieces that are cut otherwise when they are joined


@dataclass(frozen=True)
class Room:
    """A length in tokens, and how much of it things take.

    Attributes:
        tokenizer: the model's.
        length: tokens in all.
        markup: whether the tokens of the chat template are counted too.
    """

    tokenizer: Tokenizer
    length: int
    markup: bool = True

    @cached_property
    def chat(self) -> int:
        """Tokens that the tokenizer's chat template puts around one message."""
        template = getattr(self.tokenizer, "apply_chat_template", None)
        if template is None or not getattr(self.tokenizer, "chat_template", None):
            return CHAT_TOKENS
        said = [{"role": "user", "content": ""}]
        text = template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return self.tokens(text)

    def tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text)) if text else 0

    def spent(self, sample: Sample) -> int:
        """Tokens of a sample's longest prompt with its answer."""
        turns = [self._turn(sample, turn) for turn in sample.turns]
        asked = sum(turns) if sample.mode == "multi_turn" else max(turns)
        return self.tokens(sample.context) + asked + SEAM

    def left(self, sample: Sample) -> int:
        """Tokens that a sample leaves free; below zero where it does not fit."""
        return self.length - self.spent(sample)

    def _turn(self, sample: Sample, turn: Turn) -> int:
        answer = turn.max_new_tokens
        if sample.mode == "multi_turn":  # later turns may see the gold answers instead of the model's
            answer = max(answer, self.tokens(", ".join(turn.answers))) + SEAM
        markup = self.chat if sample.chat and self.markup else 0
        return self.tokens(turn.question) + self.tokens(turn.answer_prefix) + answer + markup


def filled(
    make: Make,
    room: Room,
    *,
    count: int,
    least: int = 1,
    most: int | None = None,
    items: int | None = None,
    step: int | None = None,
) -> Iterator[Sample]:
    """``count`` samples, each with as many units as fit.

    Args:
        make: builds a sample.
        room: what it must fit into.
        count: how many samples.
        least: units that a sample needs at least.
        most: units there are, if they run out.
        items: samples there are, if they run out; those too large for the room are then passed over.
        step: search on the first sample only, as RULER does; others give up this many units at a time where they do not
            fit. None searches for each sample.

    Raises:
        ContextError: a sample does not fit even with the fewest units (with ``items``: none of the first does).
    """
    units, made = 0, 0
    for number in range(count if items is None else items):
        if made == count:
            return
        fits = partial(_fits, make, room, number)
        if not fits(least):
            if items is None or (not made and number + 1 == min(items, PATIENCE)):
                raise too_short(room, make(number, least))
            continue
        if step is None or not units:
            units = _largest(fits, units or least, least, most)
        yield make(number, units if step is None else _smaller(fits, units, step, least))
        made += 1


def _fits(make: Make, room: Room, number: int, units: int) -> bool:
    return room.left(make(number, units)) >= 0


def _largest(fits: Callable[[int], bool], near: int, least: int, most: int | None) -> int:
    """The largest number of units that fits, looked for around ``near``; ``least`` is known to fit."""
    fine = near == least or fits(near)
    low, high = _outwards(fits, near, most) if fine else _inwards(fits, near, least)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _outwards(fits: Callable[[int], bool], low: int, most: int | None) -> tuple[int, int]:
    """A number that fits and a larger one that does not, or is more than there are; in ever larger strides."""
    stride = 1
    while True:
        high = low + stride if most is None else min(low + stride, most + 1)
        if (most is not None and high > most) or not fits(high):
            return low, high
        low, stride = high, 2 * stride


def _inwards(fits: Callable[[int], bool], high: int, least: int) -> tuple[int, int]:
    """A number that fits and a larger one that does not; in ever larger strides."""
    stride = 1
    while high - stride > least and not fits(high - stride):
        high, stride = high - stride, 2 * stride
    return max(high - stride, least), high


def _smaller(fits: Callable[[int], bool], units: int, step: int, least: int) -> int:
    """The first number of units that fits, a step less at a time."""
    while units > least and not fits(units):
        units = max(units - step, least)
    return units


def at_least(task: Task, least: int, **options: int) -> None:
    """Check options of a task.

    Raises:
        OptionError: one of them is below ``least``.
    """
    for name, value in options.items():
        if value < least:
            raise OptionError(f"option {name} = {value} of task {task.name} is below {least}.")


def too_short(room: Room, sample: Sample) -> ContextError:
    """The error of a sample that is as small as it gets, and too large."""
    return ContextError(
        f"a length of {room.length} tokens is too short for task {sample.task}: its smallest sample takes "
        f"{room.spent(sample)}, the answer included. Give a length of {room.spent(sample)} or more."
    )


def middle_cut(ids: list[int], room: Room, *, head: int, tail: int) -> str:
    """The text of token ids without their middle, so that it takes at most ``head`` + ``tail`` tokens.

    Args:
        ids: what is cut.
        room: whose tokenizer decodes and counts.
        head: tokens that stay at the start.
        tail: tokens that stay at the end.
    """
    decode, limit = room.tokenizer.decode, head + tail
    if len(ids) <= limit:
        return decode(ids)
    while True:  # the two halves may take a token more once they are joined
        text = decode(ids[:head]) + (decode(ids[len(ids) - tail :]) if tail else "")
        if room.tokens(text) <= limit:
            return text
        head, tail = (head, tail - 1) if tail else (head - 1, 0)
