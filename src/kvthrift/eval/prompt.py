"""From a sample to token ids: what is read and compressed, and what is asked afterwards.

The context and what follows it are tokenized apart, so that a context has the same tokens whether its question is
hidden or visible. Knows nothing of caches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from zlib import crc32

from transformers import PreTrainedTokenizerBase

from kvthrift.errors import ContextError, UnsupportedModelError
from kvthrift.eval.sample import Sample, Turn

SEAM = "#@kvthrift-seam@#"  # marks the end of the context while a chat template is at work
NO_TEMPLATE = "the tokenizer has no chat template, so prompts are plain text"
ALL_ASKED = ("ruler_all",)  # scorers that want every answer, not one of them
SHORTEST_SPAN = 3  # characters of a gold answer that is looked for in the context


@dataclass(frozen=True)
class Ask:
    """One question: which turn, and the ids to feed before the answer; none where they were read already."""

    turn: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """Ids that are read in one pass and compressed behind it, and what is then asked of them."""

    ids: tuple[int, ...]
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Prompt:
    """A sample as a model sees it.

    Attributes:
        readings: one; several where each request is visible to its own reading.
        context: leading ids of each reading that hold nothing of a question.
        relevant: places of those that hold a gold answer.
        longest: tokens of the longest way through, its answer included.
        note: what the reader of a table should know; may be empty.
    """

    readings: tuple[Reading, ...]
    context: int
    relevant: tuple[int, ...]
    longest: int
    note: str = ""

    @property
    def digest(self) -> str:
        """Eight hex digits of all ids: two arms were given the same prompt if theirs agree."""
        asked = [chain(reading.ids, *(ask.ids for ask in reading.asks)) for reading in self.readings]
        return f"{crc32(repr([list(ids) for ids in asked]).encode()):08x}"


def build_prompt(tokenizer: PreTrainedTokenizerBase, sample: Sample, *, visible: bool) -> Prompt:
    """The ids of a sample.

    In the chat template if the sample wants it and the tokenizer has one, else plain text. With a hidden question the
    context is read alone. With a visible one the first question is read too, and each request of a "multi_request"
    sample with its own.

    Raises:
        ContextError: there is no context, or no question.
        UnsupportedModelError: the chat template rewrites its messages, so that the seam is lost.
    """
    if not sample.context.strip() or not sample.turns:
        raise ContextError(
            f"sample {sample.id} of {sample.task} has no context or no question, so nothing can be asked."
        )
    templated = sample.chat and bool(tokenizer.chat_template)
    head, tails = _templated(tokenizer, sample) if templated else _plain(sample)
    context, relevant = _context(tokenizer, head, sample, special=not templated)
    readings = tuple(_readings(tokenizer, context, tails, sample.mode, visible))
    note = "" if templated or not sample.chat else NO_TEMPLATE
    return Prompt(readings, len(context), relevant, _longest(readings, sample), note)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text without special tokens, however long."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else ()


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a plain text."""
    plain = tokenize(tokenizer, "a")
    whole = tuple(tokenizer("a", verbose=False)["input_ids"])
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else ()


# -- texts -------------------------------------------------------------------------------------------------------


def _plain(sample: Sample) -> tuple[str, list[str]]:
    tails: list[str] = []
    said = ""
    for turn in sample.turns:
        tails.append(said + turn.question + turn.answer_prefix)
        if sample.mode == "multi_turn":
            said = f"{tails[-1]}{_gold(sample, turn)}\n\n"
    return sample.context, tails


def _templated(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[str, list[str]]:
    head, tails = "", []
    said: list[dict[str, str]] = []
    for turn in sample.turns:
        first = not said
        content = f"{sample.context}{SEAM}{turn.question}" if first else turn.question
        asked = [*said, {"role": "user", "content": content}]
        head, tail = _seam(_render(tokenizer, asked), sample)
        tails.append(tail + turn.answer_prefix)
        if sample.mode == "multi_turn":
            said = [*asked, {"role": "assistant", "content": turn.answer_prefix + _gold(sample, turn)}]
    return head, tails


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The conversation up to where the model answers; reasoning models are asked to answer at once."""
    return str(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    )


def _seam(text: str, sample: Sample) -> tuple[str, str]:
    if text.count(SEAM) != 1:
        raise UnsupportedModelError(
            f"the chat template rewrites the message of sample {sample.id}, so the place where its question begins "
            "is lost. Use a model whose template quotes it."
        )
    head, _, tail = text.partition(SEAM)
    return head, tail


def _gold(sample: Sample, turn: Turn) -> str:
    """What a right answer adds to its start: the first of the alternatives, or all where all are asked for."""
    answers = turn.answers if sample.scorer in ALL_ASKED else turn.answers[:1]
    gap = " " if turn.answer_prefix and not turn.answer_prefix[-1].isspace() else ""
    return gap + ", ".join(answer.strip() for answer in answers)


# -- ids ---------------------------------------------------------------------------------------------------------


def _readings(
    tokenizer: PreTrainedTokenizerBase, context: tuple[int, ...], tails: list[str], mode: str, visible: bool
) -> list[Reading]:
    ids = [tokenize(tokenizer, tail) for tail in tails]
    if not visible:
        return [Reading(context, tuple(Ask(turn, tail) for turn, tail in enumerate(ids)))]
    if mode == "multi_request":
        return [Reading(context + tail, (Ask(turn, ()),)) for turn, tail in enumerate(ids)]
    later = [Ask(turn, tokenize(tokenizer, _behind(tails[0], tail))) for turn, tail in enumerate(tails) if turn]
    return [Reading(context + ids[0], (Ask(0, ()), *later))]


def _behind(first: str, tail: str) -> str:
    """What a later turn adds to the first."""
    if not tail.startswith(first):
        raise UnsupportedModelError(
            "the chat template shows an earlier question otherwise once it is answered, so a conversation cannot go "
            "on from what was read. Hide the question, or use another model."
        )
    return tail[len(first) :]


def _longest(readings: tuple[Reading, ...], sample: Sample) -> int:
    return max(
        len(reading.ids) + len(ask.ids) + sample.turns[ask.turn].max_new_tokens
        for reading in readings
        for ask in reading.asks
    )


def _context(
    tokenizer: PreTrainedTokenizerBase, head: str, sample: Sample, *, special: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the context, and the places of those that hold a gold answer."""
    ids = tokenize(tokenizer, head)
    before = first_tokens(tokenizer) if special else ()
    golds = {gold.strip() for turn in sample.turns for gold in turn.answers}
    spans = [span for gold in sorted(golds) if len(gold) >= SHORTEST_SPAN for span in find_spans(gold, head)]
    places = sorted({place + len(before) for place in _tokens_of(tokenizer, head, ids, spans)})
    return before + ids, tuple(places)


def find_spans(words: str, text: str) -> list[tuple[int, int]]:
    """Where ``words`` stand in ``text``, not as part of a longer word: (start, stop) in characters."""
    edge = "[0-9A-Za-z]"
    before = f"(?<!{edge})" if re.match(edge, words[0]) else ""
    after = f"(?!{edge})" if re.match(edge, words[-1]) else ""
    return [found.span() for found in re.finditer(f"{before}{re.escape(words)}{after}", text)]


def _tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: tuple[int, ...], spans: list[tuple[int, int]]
) -> set[int]:
    """Places of the tokens that share characters with a span; by counting where there are no offsets."""
    if not spans:
        return set()
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return {i for i, (a, b) in enumerate(offsets) for start, stop in spans if a < stop and start < b}
    out: set[int] = set()
    for start, stop in spans:
        first, last = (len(tokenize(tokenizer, text[:end])) for end in (start, stop))
        out |= set(range(min(first, len(ids) - 1), min(last, len(ids))))
    return out
