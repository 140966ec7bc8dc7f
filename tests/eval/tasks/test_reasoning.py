"""Worked problems, choices, code and books: shots, answers, and what is never shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvthrift.errors import ContextError, OptionError
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.sample import Sample, Tokenizer, Turn
from kvthrift.eval.tasks import find
from kvthrift.eval.tasks.fit import Room
from kvthrift.eval.tasks.gsm8k import asked, problems
from kvthrift.eval.tasks.worked import WORKED


def draw(
    name: str, tokenizer: Tokenizer, length: int, count: int, data: Path | None = None, **options: object
) -> list[Sample]:
    samples = list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=5, data=data))
    assert all(Room(tokenizer, length).left(sample) >= 0 for sample in samples)
    return samples


def _gold(*answers: str) -> tuple[Sample, Turn]:
    turn = Turn("?", answers)
    return Sample("0", "toy", "c", (turn,), "last_number"), turn


def test_worked_problems_come_to_their_numbers() -> None:
    assert len(WORKED) == 8
    for _, reasoning, answer in WORKED:
        assert SCORERS["last_number"](f"{reasoning} The answer is {answer}.", *_gold(answer)) == 1
        sums = re.findall(r"(?<![\w] [+*/-] )\b(\d[\d +*/-]*\d) = (\d+)(?!\d| \*)", reasoning)
        assert answer in {right for _, right in sums}
        assert all(eval(left) == int(right) for left, right in sums)  # digits and signs only


def test_problems_lose_their_calculator_marks(data: Path) -> None:
    found = problems(data)
    assert len(found) == 1319
    assert all(re.fullmatch(r"-?[\d.]+", problem.answer) for problem in found)
    assert not any("<<" in problem.reasoning or "####" in problem.reasoning for problem in found)


def test_eight_shots_then_a_question(smol: Tokenizer, data: Path) -> None:
    (sample,) = draw("gsm8k.cot", smol, 2048, 1, data)
    assert sample.context.count("Question:") == 8
    assert sample.turns[0].question.startswith("Question:")
    assert SCORERS[sample.scorer](f" so it is {sample.turns[0].answers[0]}.", sample, sample.turns[0]) == 1
    assert draw("gsm8k.cot", smol, 1024, 1, data, shots=2)[0].context.count("Question:") == 2
    with pytest.raises(ContextError, match=r"gsm8k\.cot"):
        draw("gsm8k.cot", smol, 700, 1, data)
    with pytest.raises(OptionError, match="shots = 9"):
        draw("gsm8k.cot", smol, 2048, 1, data, shots=9)


def test_many_shots_fill_the_length_and_never_hold_the_question(words: Tokenizer, data: Path) -> None:
    (sample,) = draw("gsm8k.many_shot", words, 4096, 1, data)
    assert sample.meta["shots"] == sample.context.count("Question:") > 20
    assert Room(words, 4096).left(sample) < 400
    head, tail = asked(data, 5, "gsm8k.many_shot")
    assert not {problem.number for problem in head} & {problem.number for problem in tail}


def test_many_questions_are_numbered_and_so_are_their_answers(words: Tokenizer, data: Path) -> None:
    first, second = draw("gsm8k.long", words, 3000, 2, data)
    count = first.meta["questions"]
    assert 10 < count < 35
    assert len(first.turns[0].answers) == count
    assert first.turns[0].max_new_tokens == 4096 * count // 35
    assert not set(first.meta["problems"]) & set(second.meta["problems"])
    said = " ".join(f"Answer {place}: The answer is {gold}." for place, gold in enumerate(first.turns[0].answers, 1))
    assert SCORERS[first.scorer](said.removeprefix("Answer 1:"), first, first.turns[0]) == 1
    assert draw("gsm8k.long", words, 12000, 1, data)[0].meta["questions"] == 35


def test_competition_problems_may_take_all_that_is_left(smol: Tokenizer, data: Path) -> None:
    (sample,) = draw("math500.cot", smol, 2048, 1, data, answer_tokens=0)
    assert Room(smol, 2048).left(sample) == 0
    assert sample.turns[0].max_new_tokens > 1000
    gold = sample.turns[0].answers[0]
    assert SCORERS["boxed"](f"so \\boxed{{{gold}}}", sample, sample.turns[0]) == 1


def test_every_competition_answer_equals_itself(words: Tokenizer, data: Path) -> None:
    for sample in draw("math500.cot", words, 4096, 500, data):
        gold = sample.turns[0].answers[0]
        assert SCORERS["boxed"](f"\\boxed{{0}} then $\\boxed{{ {gold} }}$.", sample, sample.turns[0]) == 1


@pytest.mark.parametrize(("name", "choices"), [("choice.mmlu", 4), ("choice.commonsenseqa", 5)])
def test_choices_have_letters_and_shots_of_their_subject(name: str, choices: int, words: Tokenizer, data: Path) -> None:
    for sample in draw(name, words, 4096, 5, data):
        assert sample.context.count("\nAnswer: ") == 5
        assert sample.meta["choices"] == tuple("ABCDE"[:choices])
        assert sample.turns[0].answers[0] in sample.meta["choices"]
        assert sample.turns[0].question not in sample.context
        assert re.findall(r"^([A-E])\. ", sample.turns[0].question, re.MULTILINE) == list("ABCDE"[:choices])
        assert SCORERS["choice"](f" {sample.turns[0].answers[0]}\n\nQuestion", sample, sample.turns[0]) == 1


@pytest.mark.parametrize("name", ["code.humaneval", "code.mbpp"])
def test_canonical_solutions_are_wholly_like_themselves(name: str, words: Tokenizer, data: Path) -> None:
    samples = draw(name, words, 3000, 60, data)
    for sample in samples:
        gold = sample.turns[0].answers[0]
        assert not sample.chat
        assert SCORERS[sample.scorer](gold + "\n\n\ndef other():\n    pass\n", sample, sample.turns[0]) == 1


def test_what_follows_a_passage_is_what_follows_it(tokenizer: Tokenizer, no_data: None) -> None:
    from kvthrift.data import demo_text

    for sample in draw("perplexity.books", tokenizer, 600, 2, continuation=100):
        turn = sample.turns[0]
        assert sample.context + turn.answers[0] in demo_text()
        assert 100 <= turn.max_new_tokens <= 101
        assert Room(tokenizer, 600).left(sample) < 3
        assert (turn.question, sample.scorer, sample.chat) == ("", "perplexity", False)
    with pytest.raises(ContextError, match=r"perplexity\.books"):
        draw("perplexity.books", tokenizer, 100, 1, continuation=100)
