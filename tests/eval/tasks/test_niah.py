"""The needle grid: every depth, at its depth, never too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvthrift.errors import ContextError, OptionError
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks import find, groups
from kvthrift.eval.tasks.fit import Room
from kvthrift.eval.tasks.haystack import FILLER, SHIPPED, sentences

ALL = sorted(groups()["niah"])


def draw(
    name: str, tokenizer: Tokenizer, length: int, count: int, data: Path | None = None, **options: object
) -> list[Sample]:
    return list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=3, data=data))


def around(sample: Sample) -> tuple[str, str]:
    """The haystack before and behind the needle."""
    text = sample.context.split("\n\n", 1)[1]
    start = text.index(sample.turns[0].answers[0])
    needle = text.rfind("The special magic", 0, start) if sample.scorer == "substring" else start
    end = text.index(".", start) + 1
    return text[:needle], text[end:]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("haystack", ["book", "filler"])
@given(length=st.integers(600, 2500))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_needles_fit_and_stand_at_their_depth(name: str, haystack: str, tokenizer: Tokenizer, length: int) -> None:
    for sample in draw(name, tokenizer, length, 3, haystack=haystack, depths=5):
        assert Room(tokenizer, length).left(sample) >= 0
        parts = around(sample)
        before, behind = (len(tokenizer.encode(part)) for part in parts)
        following = sentences(parts[1]) if haystack == "book" else [FILLER]
        unit = len(tokenizer.encode(following[0])) + 3 if following else 0
        whole = before + behind
        assert before / whole <= sample.meta["depth"] + 0.02
        assert (before + unit) / whole > sample.meta["depth"] - 0.02
        assert sample.meta["at"] == pytest.approx(before / whole, abs=0.02)


@pytest.mark.parametrize("name", ALL)
def test_both_ends_are_exact(name: str, words: Tokenizer) -> None:
    found = {sample.meta["depth"]: around(sample) for sample in draw(name, words, 1500, 11)}
    assert len(found) == 11
    assert found[0.0][0] == ""
    assert found[1.0][1].strip() == ""


def test_the_grid_comes_round(words: Tokenizer) -> None:
    depths = [sample.meta["depth"] for sample in draw("niah.number", words, 900, 22)]
    assert depths[:11] == depths[11:]
    assert sorted(depths[:11]) == pytest.approx([step / 10 for step in range(11)])
    assert max(depths[:3]) - min(depths[:3]) > 0.5  # a few samples see much of it


def test_answers_are_long_where_they_should_be(words: Tokenizer) -> None:
    lengths = {"niah.number": 7, "niah.number64": 64, "niah.uuid": 36}
    for name, letters in lengths.items():
        assert len(draw(name, words, 900, 1)[0].turns[0].answers[0]) == letters


def test_new_tokens_hold_the_answer(smol: Tokenizer) -> None:
    for name in ALL:
        turn = draw(name, smol, 900, 1)[0].turns[0]
        assert len(smol.encode(" " + turn.answers[0])) <= turn.max_new_tokens


def test_meta_has_what_a_heat_map_needs(words: Tokenizer, no_data: None) -> None:
    sample = draw("niah.uuid", words, 900, 1)[0]
    assert sample.meta == {"length": 900, "depth": 0.0, "at": 0.0, "haystack": SHIPPED}
    assert draw("niah.uuid", words, 900, 1, haystack="filler")[0].context.count(FILLER) > 10


def test_kamradts_sentence_keeps_200_tokens_free(words: Tokenizer) -> None:
    sample = draw("niah.sentence", words, 1000, 1)[0]
    before, behind = (len(words.encode(part)) for part in around(sample))
    assert 1000 - 200 - 80 < before + behind <= 1000 - 200
    assert sample.scorer == "rouge_1"
    assert sample.turns[0].max_new_tokens == 30


def test_too_short_is_refused(words: Tokenizer) -> None:
    for length in (20, 230):
        with pytest.raises(ContextError, match=r"niah\.sentence"):
            draw("niah.sentence", words, length, 1)
    with pytest.raises(OptionError, match="depths = 0"):
        draw("niah.number", words, 900, 1, depths=0)
