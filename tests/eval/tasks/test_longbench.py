"""LongBench's form on a made-up folder: prompts, scorers, the middle cut; and the local files mapped into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvthrift.errors import ContextError, DataError
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks import find, groups
from kvthrift.eval.tasks.fit import Room

ALL = [*groups()["longbench"], *groups()["longbench_zh"]]
CAPS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32,
    "gov_report": 512, "qmsum": 512, "multi_news": 512, "trec": 64, "triviaqa": 32, "samsum": 128,
    "passage_count": 32, "passage_retrieval_en": 32, "lcc": 64, "repobench-p": 64,
    "multifieldqa_zh": 64, "dureader": 128, "vcsum": 512, "lsht": 64, "passage_retrieval_zh": 32,
}  # fmt: skip
PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}  # no chat template
ONE_LINE = {"trec", "triviaqa", "samsum", "lsht"}


def row(name: str, words: int = 50) -> dict[str, object]:
    text = " ".join(f"word{place}" for place in range(words))
    classes = ["Number", "Number of something"] if name in {"trec", "lsht"} else None
    return {
        "input": "What is asked?", "context": text, "answers": ["an answer", "another"], "length": words,
        "dataset": name, "language": "en", "all_classes": classes, "_id": f"id-{words}",
    }  # fmt: skip


def write(folder: Path, file: str, *rows: dict[str, object]) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("".join(json.dumps(one) + "\n" for one in rows))


def draw(
    name: str, tokenizer: Tokenizer, length: int, count: int, data: Path | None, **options: object
) -> list[Sample]:
    samples = list(find([name], **options)[0].samples(tokenizer, length=length, count=count, seed=5, data=data))
    assert all(Room(tokenizer, length).left(sample) >= 0 for sample in samples)
    return samples


def test_there_are_21_sets_and_16_of_them_are_averaged() -> None:
    assert {name.removeprefix("longbench.") for name in ALL} == set(CAPS)
    assert len(groups()["longbench"]) == 16


@pytest.mark.parametrize("name", sorted(CAPS))
def test_every_set_reads_its_file(name: str, words: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, f"longbench/{name}.jsonl", row(name))
    (sample,) = draw(f"longbench.{name}", words, 1000, 9, tmp_path)
    turn = sample.turns[0]
    assert sample.id == "id-50"
    assert "word0" in sample.context
    assert sample.context.endswith("word49")
    assert turn.answers == ("an answer", "another")
    assert turn.max_new_tokens == CAPS[name]
    assert sample.chat == (name not in PLAIN)
    assert sample.meta.get("first_line", False) == (name in ONE_LINE)
    assert sample.scorer in SCORERS
    assert ("What is asked?" in turn.question) == (
        name not in {"gov_report", "multi_news", "passage_count", "lcc", "vcsum"}
    )
    if name in {"trec", "lsht"}:
        assert sample.meta["classes"] == ("Number", "Number of something")


@pytest.mark.parametrize("place", ["longbench", "LongBench", "LongBench/data"])
def test_files_may_lie_as_they_were_unpacked(place: str, words: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, f"{place}/trec.jsonl", row("trec"))
    assert len(draw("longbench.trec", words, 1000, 9, tmp_path)) == 1


def test_long_prompts_lose_their_middle(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, "longbench/hotpotqa.jsonl", row("hotpotqa", 3000))
    (sample,) = draw("longbench.hotpotqa", tokenizer, 1000, 1, tmp_path)
    text = sample.context.split("passages.\n")[1]
    assert text.startswith("word0 word1 word2")
    assert text.endswith("word2998 word2999")
    assert Room(tokenizer, 1000).left(sample) < 10
    assert sample.meta["cut"] > 1000
    head = next(place for place in range(3000) if f"word{place}" not in text)
    before = sample.context[: sample.context.index(f"word{head - 1}") + len(f"word{head - 1}")]
    behind = sample.context[len(before) :] + sample.turns[0].question + sample.turns[0].answer_prefix
    assert abs(len(tokenizer.encode(before)) - len(tokenizer.encode(behind))) < 12  # the prompt's two halves


def test_long_documents_may_be_passed_over(words: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, "longbench/hotpotqa.jsonl", row("hotpotqa", 3000), row("hotpotqa", 60))
    assert [sample.id for sample in draw("longbench.hotpotqa", words, 1000, 2, tmp_path, overlong="skip")] == ["id-60"]
    write(tmp_path, "longbench/musique.jsonl", row("musique", 3000))
    with pytest.raises(ContextError, match=r"longbench\.musique"):
        draw("longbench.musique", words, 100, 1, tmp_path)


def test_missing_sets_say_what_to_get(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"longbench/qasper\.jsonl or .*Get LongBench v1's qasper\.jsonl"):
        draw("longbench.qasper", words, 1000, 1, tmp_path)


def test_other_files_of_the_form_are_read_too(words: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, "my/own.jsonl", {"context": "c", "input": "Why?", "answers": ["because"]}, row("gov_report_e"))
    plain, known = sorted(
        draw("file.longbench", words, 1000, 9, tmp_path, file="my/own.jsonl", scorer="exact"), key=lambda s: s.id
    )
    assert (plain.context, plain.turns[0].question, plain.scorer, plain.id) == ("c", "\n\nWhy?\n", "exact", "0")
    assert (known.scorer, known.turns[0].max_new_tokens) == ("rouge_l_sentences", 512)
    with pytest.raises(DataError, match="option file"):
        draw("file.longbench", words, 1000, 9, tmp_path)
    write(tmp_path, "bad.jsonl", {"text": "c"})
    with pytest.raises(DataError, match="no field 'answers'"):
        draw("file.longbench", words, 1000, 9, tmp_path, file="bad.jsonl")


@pytest.mark.parametrize("name", [*groups()["leval"], *groups()["bamboo"]])
def test_local_documents_are_mapped_into_the_form(name: str, words: Tokenizer, data: Path) -> None:
    samples = draw(name, words, 2000, 2, data)
    assert len(samples) == 2
    for sample in samples:
        assert sample.context
        assert sample.turns[0].answers[0]
        if sample.scorer == "choice":
            assert set(sample.turns[0].answers) <= set(sample.meta["choices"])


def test_the_broken_line_of_bamboo_is_left_out(data: Path) -> None:
    (task,) = find(["bamboo.paperqa_16k"])
    assert len(list(task.records(data))) == 99  # type: ignore[attr-defined]


def test_answers_of_stories_are_those_of_the_story(words: Tokenizer, data: Path) -> None:
    for sample in draw("leval.sci_fi", words, 2000, 5, data):
        assert sample.turns[0].answers[0] in {"True", "False"}
    for sample in draw("bamboo.reportsumsort_4k", words, 4000, 3, data):
        assert sorted(sample.turns[0].answers[0].split()) == list("01234")
