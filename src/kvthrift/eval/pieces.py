"""The text of each token of a sequence, such that joining them gives the text of the whole. Knows tokenizers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not yet a character decode to
LONGEST = 16  # tokens that a character may be spread over


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text, special tokens included.

    Tokens may be bytes: one that ends inside a character adds nothing, and the one that completes it all of it. What a
    token adds depends on those before it (decoders drop a leading space), so a few of them are decoded with it.
    """
    out: list[str] = []
    before = start = 0  # ids[before:start] are the company in which ids[start:] are decoded
    for stop in range(1, len(ids) + 1):
        known = _decode(tokenizer, ids[before:start])
        text = _decode(tokenizer, ids[before:stop])
        waiting = text.endswith(UNFINISHED) and stop < len(ids) and stop - start < LONGEST
        if waiting or len(text) <= len(known):
            out.append("")
        else:
            out.append(text[len(known) :])
            before, start = start, stop
    return tuple(out)


def spans(places: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Rising places as ranges ``(start, stop)`` without gaps."""
    out: list[tuple[int, int]] = []
    for place in places:
        if out and out[-1][1] == place:
            out[-1] = (out[-1][0], place + 1)
        else:
            out.append((place, place + 1))
    return tuple(out)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
