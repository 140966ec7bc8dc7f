"""Sessions: several questions of one context, made here or read from files of SCBench's form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvthrift.errors import DataError, OptionError
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks import find, groups
from kvthrift.eval.tasks.fit import Room


def draw(
    name: str, tokenizer: Tokenizer, length: int, count: int, data: Path | None = None, **options: object
) -> list[Sample]:
    samples = list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=5, data=data))
    assert all(Room(tokenizer, length).left(sample) >= 0 for sample in samples)
    return samples


@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_pairs_are_asked_for_one_by_one(mode: str, tokenizer: Tokenizer) -> None:
    for sample in draw("session.kv", tokenizer, 2500, 2, mode=mode):
        found = json.loads(sample.context[sample.context.index("{") :])
        keys = [re.findall(r'"(.+)"', turn.question)[0] for turn in sample.turns]
        assert len(set(keys)) == 5
        assert [found[key] for key in keys] == [turn.answers[0] for turn in sample.turns]
        assert sample.mode == mode


def test_requests_leave_more_room_than_a_conversation(words: Tokenizer) -> None:
    talk, requests = (draw("session.kv", words, 1000, 1, mode=mode)[0] for mode in ("multi_turn", "multi_request"))
    assert len(requests.context) > len(talk.context)


def test_each_chain_is_whole_and_in_order(tokenizer: Tokenizer) -> None:
    for sample in draw("session.vt", tokenizer, 2500, 2, turns=3):
        holds: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context):
            holds[name] = holds.get(value, value)
        assert len(sample.turns) == 3
        for turn in sample.turns:
            (value,) = re.findall(r"\d{5}", turn.question)
            assert {name for name, held in holds.items() if held == value} == set(turn.answers)


def test_questions_are_about_paragraphs_that_are_there(smol: Tokenizer, data: Path) -> None:
    for sample in draw("session.qa", smol, 3000, 3, data):
        assert len(sample.turns) == len({turn.question for turn in sample.turns}) == 5
        assert all(any(answer in sample.context for answer in turn.answers) for turn in sample.turns)
        assert sample.scorer == "qa_f1"


def test_a_session_has_turns(words: Tokenizer) -> None:
    with pytest.raises(OptionError, match="turns = 0"):
        draw("session.kv", words, 2500, 1, turns=0)


@pytest.mark.parametrize("name", groups()["scbench"])
def test_public_sessions_are_read(name: str, words: Tokenizer, tmp_path: Path) -> None:
    turns = [
        {"input": f"question {place}", "answer": "second", "options": ["first", "second"]}
        if "choice" in name
        else {"input": f"question {place}", "answer": ["7"]}
        for place in range(7)
    ]
    (tmp_path / "scbench").mkdir()
    file = tmp_path / "scbench" / f"{name.replace('.', '_')}.jsonl"
    rows = [
        {"id": 1, "context": "word " * 100, "multi_turns": turns},
        {"id": 2, "context": "w " * 9000, "multi_turns": turns},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (sample,) = draw(name, words, 4000, 9, tmp_path)  # the second one does not fit
    assert sample.id == "1"
    assert len(sample.turns) == 5
    assert "question 4" in sample.turns[4].question
    assert "{" not in sample.turns[4].question
    if not name.endswith("_chn"):
        assert SCORERS[sample.scorer](sample.turns[0].answers[0], sample, sample.turns[0]) == 1
    with pytest.raises(DataError, match="Get SCBench's"):
        draw(name, words, 4000, 1, tmp_path / "scbench")
