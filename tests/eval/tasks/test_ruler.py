"""RULER's tasks: any length with any tokenizer, answers in the text, needles where they should be."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvthrift.errors import ContextError
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks import find, groups
from kvthrift.eval.tasks.fit import Room
from kvthrift.eval.tasks.haystack import FILLER, SHIPPED, essays, sentences
from kvthrift.eval.tasks.ruler.frequency import zeta
from kvthrift.eval.tasks.ruler.needles import DEPTHS
from kvthrift.eval.tasks.ruler.questions import gather

ALL = sorted(groups()["ruler"])
MADE = [name for name in ALL if "qa" not in name]  # need no data
NEEDLES = [name for name in ALL if "niah" in name]
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def draw(
    name: str,
    tokenizer: Tokenizer,
    length: int,
    count: int = 1,
    seed: int = 42,
    data: Path | None = None,
    **options: object,
) -> list[Sample]:
    return list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=seed, data=data))


def whole(sample: Sample) -> str:
    return sample.context + sample.turns[0].question + sample.turns[0].answer_prefix


def needed(sample: Sample) -> list[int]:
    """Sentences of the haystack before each needle, by the answers' places."""
    return sorted(sample.context.index(answer) for answer in sample.turns[0].answers)


def test_there_are_thirteen() -> None:
    assert len(ALL) == 13


@pytest.mark.parametrize("name", MADE)
@given(length=st.integers(1400, 3000), seed=st.integers(0, 99))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_fit_and_hold_their_answers(name: str, tokenizer: Tokenizer, length: int, seed: int) -> None:
    for sample in draw(name, tokenizer, length, 2, seed):
        assert Room(tokenizer, length).left(sample) >= 0
        joined = len(tokenizer.encode(whole(sample))) + sample.turns[0].max_new_tokens
        assert joined + Room(tokenizer, length).chat <= length
        assert all(answer in sample.context for answer in sample.turns[0].answers)
        assert sample.turns[0].max_new_tokens == NEW_TOKENS[name.split(".")[1].split("_")[0]]
        assert sample.scorer == "ruler_all"


@pytest.mark.parametrize("name", ["ruler.qa_1", "ruler.qa_2"])
@pytest.mark.parametrize("length", [1500, 4096])
def test_questions_fit_and_hold_their_gold(name: str, tokenizer: Tokenizer, data: Path, length: int) -> None:
    samples = draw(name, tokenizer, length, 3, data=data)
    assert len(samples) == 3
    for sample in samples:
        assert Room(tokenizer, length).left(sample) >= 0
        answer = sample.turns[0].answers[0]
        assert answer.lower() in sample.context.lower() or answer in {"yes", "no"} or name == "ruler.qa_2"
        numbers = [int(number) for number in re.findall(r"^Document (\d+):$", sample.context, re.MULTILINE)]
        assert numbers == list(range(1, sample.meta["documents"] + 1))
        assert len(sample.meta["depths"]) == (1 if name == "ruler.qa_1" else 5)
        assert sample.scorer == "ruler_part"


def test_documents_are_gold_then_near_then_far_then_repeated() -> None:
    from random import Random

    from kvthrift.eval.tasks.passages import Question

    asked = Question("q", "?", ("a",), ("gold",), ("near 1", "near 2"))
    pool = ["gold", "near 1", "near 2", "far 1", "far 2"]
    assert gather(Random(0), asked, pool, 1) == ["gold"]
    assert set(gather(Random(0), asked, pool, 3)) == {"gold", "near 1", "near 2"}
    assert sorted(gather(Random(0), asked, pool, 5)) == sorted(pool)
    many = Counter(gather(Random(0), asked, pool, 9))
    assert many["gold"] == 1
    assert many.total() == 9


@pytest.mark.parametrize("name", MADE)
def test_the_length_is_used(name: str, smol: Tokenizer) -> None:
    sample = draw(name, smol, 4096)[0]
    assert Room(smol, 4096).left(sample) < 150  # one unit of the coarsest haystack


@pytest.mark.parametrize("name", MADE)
def test_samples_are_the_same_in_every_run_and_however_many(name: str, words: Tokenizer) -> None:
    three = draw(name, words, 2000, 3)
    assert draw(name, words, 2000, 2) == three[:2]
    assert draw(name, words, 2000, 1, seed=7) != three[:1]
    assert len({sample.id for sample in three}) == 3
    assert len({sample.context for sample in three}) == 3


@pytest.mark.parametrize("name", ["ruler.vt", "ruler.cwe", "ruler.niah_multiquery"])
def test_too_short_a_length_is_refused(name: str, words: Tokenizer) -> None:
    with pytest.raises(ContextError, match=f"task {name}"):
        draw(name, words, 120)


def test_the_leaderboard_form_splits_at_the_question_and_counts_no_markup(smol: Tokenizer) -> None:
    for name in ("ruler.vt", "ruler.cwe", "ruler.niah_multivalue"):
        sample = draw(name, smol, 3000, variant="kvpress")[0]
        official = draw(name, smol, 3000)[0]
        assert sample.context.startswith(official.context[:40])  # the statement stays in the context
        assert sample.turns[0].question.split()[:2] == official.turns[0].question.split()[:2]
        assert sample.turns[0].question.count("?") == 1
        assert Room(smol, 3000, markup=False).left(sample) >= 0
        assert len(smol.encode(sample.context)) >= len(smol.encode(official.context))


# -- needles ---------------------------------------------------------------------------------------------------------

_HIDES = re.compile(r"A special magic (number|uuid) for ([\w-]+) is: ([\w-]+)\.")


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says(name: str, needles: int, answers: int, words: Tokenizer) -> None:
    sample = draw(f"ruler.{name}", words, 3000)[0]
    turn, hidden = sample.turns[0], _HIDES.findall(sample.context)
    assert len(hidden) == needles
    assert len(turn.answers) == answers
    for kind, key, value in hidden:
        assert re.fullmatch(r"\d{7}" if kind == "number" else r"[0-9a-f-]{36}", value)
        assert (key in turn.question) == (value in turn.answers)
        assert (key in turn.answer_prefix) == (value in turn.answers)
    assert ("What are all" in turn.question) == (answers > 1)


@pytest.mark.parametrize("name", ["ruler.niah_multikey_2", "ruler.niah_multikey_3"])
def test_some_haystacks_are_nothing_but_needles(name: str, words: Tokenizer) -> None:
    sample = draw(name, words, 3000)[0]
    lines = sample.context.splitlines()[1:]
    hidden = [match for line in lines if (match := _HIDES.fullmatch(line))]
    assert len(hidden) == len(lines)
    assert len({match[2] for match in hidden}) == len({match[3] for match in hidden}) == len(lines)
    place = next(number for number, line in enumerate(lines) if sample.turns[0].answers[0] in line)
    assert sample.meta["depth"] == pytest.approx(place / (len(lines) - 1))


def test_noise_is_the_same_line_again_and_again(words: Tokenizer) -> None:
    sample = draw("ruler.niah_single_1", words, 3000)[0]
    lines = sample.context.splitlines()[1:]
    assert Counter(lines)[FILLER] == len(lines) - 1
    place = next(number for number, line in enumerate(lines) if line != FILLER)
    assert sample.meta["depth"] == pytest.approx(place / (len(lines) - 1))


@pytest.mark.parametrize("name", ["ruler.niah_single_2", "ruler.niah_multikey_1", "ruler.niah_multiquery"])
def test_needles_of_essays_stand_between_sentences_at_grid_depths(name: str, words: Tokenizer, no_data: None) -> None:
    for sample in draw(name, words, 6000, 3):
        body = sample.context.split("\n", 1)[1].rstrip("\n")
        pieces = _HIDES.split(body)
        essay = [piece.strip() for piece in pieces[::4]]
        before = [
            len(sentences(" ".join(essay[: place + 1]))) if essay[0] or place else 0 for place in range(len(essay))
        ]
        depths = sample.meta["depths"]
        assert sample.meta["haystack"] == SHIPPED
        assert sorted(set(depths)) == depths
        assert all(round(100 * depth) in DEPTHS for depth in depths)
        assert before[:-1] == [int(before[-1] * depth) for depth in depths]
        text = " ".join(essays(None)[0].split())
        assert text.startswith(" ".join(piece for piece in essay if piece)[:200])


def test_local_essays_are_used_and_said(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "mine.txt").write_text("This essay is mine. " * 50)
    sample = draw("ruler.niah_single_2", words, 2000, data=tmp_path)[0]
    assert sample.meta["haystack"] == "essays"
    assert "This essay is mine. This essay is mine." in sample.context


# -- variables, words ------------------------------------------------------------------------------------------------


def test_the_chain_gives_the_value_to_all_five(words: Tokenizer) -> None:
    sample = draw("ruler.vt", words, 3000)[0]
    example, _, text = sample.context.rpartition("Follow the variable")
    holds = set(re.findall(r"VAR (\w+) = \d", text))
    for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", text):
        assert old in holds  # the order of the chain is kept
        holds.add(new)
    assert holds == set(sample.turns[0].answers)
    assert len(holds) == 5
    assert all(len(name) == 5 for name in holds)
    solved = re.findall(r"VAR (\w+) =", example)
    assert len(solved) == 5
    assert all(len(name) == 3 for name in solved)
    assert example.rstrip().endswith(" ".join(solved))


def test_the_solved_example_of_variables_takes_about_500_tokens(smol: Tokenizer) -> None:
    context = draw("ruler.vt", smol, 4096)[0].context
    example, _, _ = context.rpartition("Follow the variable")
    assert 440 <= len(smol.encode(example)) <= 560


@pytest.mark.parametrize(("length", "often", "seldom", "example"), [(4096, 30, 3, 190), (3000, 6, 1, 40)])
def test_common_words_are_that_common(length: int, often: int, seldom: int, example: int, words: Tokenizer) -> None:
    sample = draw("ruler.cwe", words, length)[0]
    solved, _, text = sample.context.rpartition("Below is")
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", text))
    assert {word for word, count in counts.items() if count == often} == set(sample.turns[0].answers)
    assert set(counts.values()) == {often, seldom}
    assert len(re.findall(r"(\d+)\. ", solved.split("Question:")[0])) == example
    assert len(re.findall(r"(\d+)\. ", solved.split("are:")[1])) == 10


def test_frequent_words_follow_zeta(smol: Tokenizer) -> None:
    sample = draw("ruler.fwe", smol, 4096)[0]
    text = sample.context.partition("most often.")[2]
    ranked = Counter(text.split()).most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(sample.turns[0].answers)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])
    most = ranked[0][1]
    assert [count for _, count in ranked[:6]] == [pytest.approx(most / rank**2, abs=1.1) for rank in range(1, 7)]
    assert most * zeta(2.0) == pytest.approx(
        sample.meta["words"], rel=0.05
    )  # words of rarer ranks are cut to whole ones


def test_zeta_is_zeta() -> None:
    assert zeta(2.0) == pytest.approx(3.141592653589793**2 / 6, abs=1e-9)
    assert zeta(4.0) == pytest.approx(3.141592653589793**4 / 90, abs=1e-12)
