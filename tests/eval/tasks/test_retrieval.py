"""Lookups, documents, lines, topics and scattered facts: in the text, at their depth, in order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvthrift.errors import ContextError
from kvthrift.eval.metrics.answers_choice import only_label
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks import find
from kvthrift.eval.tasks.babilong import stories
from kvthrift.eval.tasks.fit import Room


def draw(
    name: str, tokenizer: Tokenizer, length: int, count: int, data: Path | None = None, **options: object
) -> list[Sample]:
    samples = list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=5, data=data))
    assert all(Room(tokenizer, length).left(sample) >= 0 for sample in samples)
    return samples


def pairs(sample: Sample) -> dict[str, str]:
    found: dict[str, str] = json.loads(sample.context[sample.context.index("{") :])
    return found


@pytest.mark.parametrize("length", [700, 2500])
def test_keys_are_at_their_depth(length: int, tokenizer: Tokenizer) -> None:
    samples = draw("lookup.kv", tokenizer, length, 5, depths=5)
    assert sorted(sample.meta["depth"] for sample in samples) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.1)
    for sample in samples:
        found = pairs(sample)
        key = re.findall(r'"(.+)"', sample.turns[0].question)[0]
        assert found[key] == sample.turns[0].answers[0]
        assert list(found).index(key) / (len(found) - 1) == sample.meta["depth"]


def test_the_published_keys_are_whole_where_they_fit(smol: Tokenizer, data: Path) -> None:
    whole, cut = (draw("lookup.kv75", smol, length, 1, data)[0] for length in (8000, 3000))
    assert whole.id == cut.id
    assert len(pairs(whole)) == 75
    assert pairs(cut).items() < pairs(whole).items()
    assert cut.meta["depth"] == pytest.approx(whole.meta["depth"], abs=0.05)
    assert cut.turns == whole.turns


def test_gold_documents_are_at_their_depth_and_alone(smol: Tokenizer, data: Path) -> None:
    for sample in draw("lookup.documents", smol, 2000, 3, data):
        documents = re.split(r"\n\nDocument \[\d+\] ", sample.context)[1:]
        assert len(documents) == sample.meta["documents"]
        place = round(sample.meta["depth"] * (len(documents) - 1))
        others = [words for at, words in enumerate(documents) if at != place]
        assert not any(answer.lower() in words.lower() for answer in sample.turns[0].answers for words in others)
    fixed = draw("lookup.documents", smol, 3000, 2, data, documents=10)
    assert [sample.meta["documents"] for sample in fixed] == [10, 10]
    with pytest.raises(ContextError, match=r"lookup\.documents"):
        draw("lookup.documents", smol, 1000, 1, data, documents=30)


@pytest.mark.parametrize("length", [1500, 5000])
def test_lines_keep_their_depth(length: int, smol: Tokenizer, data: Path) -> None:
    for sample in draw("longeval.lines", smol, length, 3, data):
        lines = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", sample.context, re.MULTILINE)
        assert len(lines) == sample.meta["lines"]
        place = round(sample.meta["depth"] * (len(lines) - 1))
        assert f"line {lines[place][0]}?" in sample.turns[0].question
        assert sample.turns[0].answers == (lines[place][1],)
        assert "Tell me" not in sample.context


def test_topics_begin_with_the_one_asked_for(smol: Tokenizer, data: Path) -> None:
    for sample in draw("longeval.topics", smol, 4096, 3, data):
        first = re.findall(r"discuss the topic of ([^<]+?)\. ", sample.context)[0]
        assert first.lower().strip() in sample.turns[0].answers[0].lower()
        assert "the record ends" not in sample.context
        assert 1 <= sample.meta["topics"] <= 5
    assert draw("longeval.topics", smol, 1500, 1, data)[0].meta["topics"] < 5


def test_stories_end_with_their_question() -> None:
    first = "1 A is in b.\n2 C went to d.\n3 Where is A? \tb\t1\n4 A went to d.\n5 Where is A?\td\t4\n"
    text = f"{first}1 E has f.\n2 What has E?\tf\t1\n"
    found = list(stories(text))
    assert [len(story.facts) for story in found] == [2, 3, 1]
    assert [(story.question, story.answer, story.support) for story in found] == [
        ("Where is A?", "b", (0,)),
        ("Where is A?", "d", (2,)),
        ("What has E?", "f", (0,)),
    ]


def test_a_way_is_one_answer(smol: Tokenizer, data: Path) -> None:
    (sample,) = draw("babilong.qa19", smol, 1500, 1, data)
    turn = sample.turns[0]
    (gold,) = turn.answers
    first, second = gold.split()
    assert {first, second} <= {"north", "south", "east", "west"}
    assert f"Answer: {gold}" not in sample.context.rpartition("\n\nText:")[2]
    assert only_label(f" {gold}.", sample, turn) == 1
    assert only_label(f" {first}.", sample, turn) == 0
    assert first == second or only_label(f" {second} {first}.", sample, turn) == 0


@pytest.mark.parametrize("name", [f"babilong.qa{number}" for number in (1, 8, *range(11, 19), 20)])
def test_facts_are_scattered_in_order(name: str, smol: Tokenizer, data: Path) -> None:
    file = find([name])[0].file  # type: ignore[attr-defined]
    from kvthrift.eval.tasks import local

    known = list(stories(local.text(local.find(data, f"babi/{file}_test.txt", get="bAbI"))))
    for sample in draw(name, smol, 1500, 2, data):
        story = known[int(sample.id)]
        assert sample.turns[0].answers == (story.answer,)
        text = sample.context.rpartition("\n\nText:")[2]
        at = -1
        for fact in story.facts:
            at = text.index(fact, at + 1)
        assert set(story.answer.split(",")) <= set(sample.meta["labels"])
        assert len(sample.meta["depths"]) == len(story.support)
        assert len(text) > 2 * sum(map(len, story.facts))
