"""A sample never takes more than its length, and as much of it as it can."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.eval.tasks.toy import Words

from kvthrift.errors import ContextError
from kvthrift.eval.sample import Sample, Tokenizer, Turn
from kvthrift.eval.tasks.fit import CHAT_TOKENS, SEAM, Room, filled, middle_cut


def sample(context: str, *turns: Turn, mode: str = "single", chat: bool = True) -> Sample:
    return Sample("0", "toy", context, turns, "substring", chat=chat, mode=mode)


def asked(new_tokens: int, *answers: str) -> Turn:
    return Turn(" what now", answers or ("x",), " so", new_tokens)


def test_spent_counts_every_part(words: Tokenizer) -> None:
    room = Room(words, 100)
    assert room.spent(sample("a b c", asked(10), chat=False)) == 3 + 2 + 1 + 10 + SEAM
    assert room.spent(sample("a b c", asked(10))) == 3 + 2 + 1 + 10 + CHAT_TOKENS + SEAM
    assert Room(words, 100, markup=False).spent(sample("a b c", asked(10))) == 3 + 2 + 1 + 10 + SEAM


def test_spent_of_requests_is_that_of_the_longest(words: Tokenizer) -> None:
    room = Room(words, 100)
    both = sample("a b c", asked(10), asked(20), mode="multi_request", chat=False)
    assert room.spent(both) == room.spent(sample("a b c", asked(20), chat=False))


def test_spent_of_a_conversation_is_all_of_it_and_gold_answers_may_be_longer(words: Tokenizer) -> None:
    both = sample("a b c", asked(1, "one two three four"), asked(20), mode="multi_turn", chat=False)
    assert Room(words, 100).spent(both) == 3 + (2 + 1 + 4 + SEAM) + (2 + 1 + 20 + SEAM) + SEAM


def test_the_chat_template_is_asked_what_it_takes(smol: Tokenizer) -> None:
    text = smol.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    assert Room(smol, 100).chat >= len(smol.encode(text)) - len(smol.encode("hi"))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    length=st.integers(60, 400),
    step=st.sampled_from([None, 1, 7]),
)
@settings(max_examples=60, deadline=None)
def test_filled_samples_fit_and_are_full(sizes: list[int], length: int, step: int | None) -> None:
    room = Room(Words(), length)

    def make(number: int, units: int) -> Sample:
        return sample("w " * (sizes[number] * units), asked(5))

    if room.left(make(0, 1)) < 0:
        with pytest.raises(ContextError, match="too short"):
            list(filled(make, room, count=1, step=step))
        return
    fitting = [number for number in range(len(sizes)) if room.left(make(number, 1)) >= 0]
    made = list(filled(make, room, count=len(sizes), items=len(sizes), step=step))
    assert len(made) == len(fitting)
    assert all(room.left(one) >= 0 for one in made)
    if step is None:
        assert all(room.left(one) < sizes[number] for number, one in zip(fitting, made, strict=True))


@given(most=st.integers(1, 40), length=st.integers(60, 200))
@settings(max_examples=40, deadline=None)
def test_no_more_units_are_taken_than_there_are(most: int, length: int) -> None:
    used: list[int] = []

    def make(number: int, units: int) -> Sample:
        used.append(units)
        return sample("w " * units, asked(5))

    list(filled(make, Room(Words(), length), count=3, most=most))
    assert max(used) <= most


def test_too_short_says_what_would_do(words: Tokenizer) -> None:
    def make(number: int, units: int) -> Sample:
        return sample("w " * units, asked(5))

    with pytest.raises(ContextError, match="task toy: its smallest sample takes") as error:
        next(filled(make, Room(words, 20), count=1))
    enough = int(str(error.value).split("Give a length of ")[1].split()[0])
    assert len(list(filled(make, Room(words, enough), count=1))) == 1


@given(text=st.text("ab \n", max_size=200), head=st.integers(0, 20), tail=st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_middle_cut_keeps_both_ends(text: str, head: int, tail: int) -> None:
    room = Room(Words(), 100)
    ids = room.tokenizer.encode(text)
    cut = middle_cut(ids, room, head=head, tail=tail)
    assert room.tokens(cut) <= max(head + tail, 0) or cut == text
    if len(ids) <= head + tail:
        assert cut == text
    else:
        assert cut.startswith(room.tokenizer.decode(ids[: max(head - 1, 0)]))
        assert not tail or text.endswith(cut[-1:])


def test_middle_cut_of_real_tokens(smol: Tokenizer) -> None:
    room = Room(smol, 100)
    text = "Zwölf naïve Übungen, 12,345 façades; " * 40
    cut = middle_cut(smol.encode(text), room, head=31, tail=33)
    assert room.tokens(cut) <= 64
    assert text.startswith(cut[:40])
    assert text.endswith(cut[-40:])
