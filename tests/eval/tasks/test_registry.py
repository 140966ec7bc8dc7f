"""Every task by name: unique, described, findable, repeatable, within its length."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvthrift.errors import DataError, OptionError, UnknownNameError
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.sample import Tokenizer
from kvthrift.eval.tasks import _FILES, find, groups, tasks
from kvthrift.eval.tasks.fit import Room
from kvthrift.eval.tasks.perplexity import SCORER

NO_DATA = ("longbench", "longbench_zh", "file", "scbench")  # sets that are not to be had everywhere
MADE = [
    *(name for group in ("ruler", "niah", "session") for name in groups()[group] if ".qa" not in name),
    "lookup.kv",
    "perplexity.books",
]
LOCAL = [name for name, task in tasks().items() if task.group not in NO_DATA]


def test_every_file_of_tasks_is_listed() -> None:
    home = Path(find(["ruler.vt"])[0].samples.__code__.co_filename).parents[1]
    there = {".".join(path.relative_to(home).with_suffix("").parts) for path in home.rglob("*.py")}
    with_tasks = {name for name in there if "\nTASKS = (" in (home / (name.replace(".", "/") + ".py")).read_text()}
    assert with_tasks == set(_FILES)
    assert list(_FILES) == sorted(_FILES)


def test_names_groups_and_summaries_are_there() -> None:
    assert len(tasks()) == sum(map(len, groups().values()))
    for name, task in tasks().items():
        assert task.name == name
        assert name.partition(".")[0] in {task.group, task.group.removesuffix("_zh")}
        assert task.summary
        assert task.summary[-1] != "."
    assert not set(tasks()) & set(groups())


def test_groups_names_and_patterns_are_found_once_and_in_order() -> None:
    assert [task.name for task in find(["ruler.vt", "ruler", "niah.uuid"])][0::13] == ["ruler.vt", "niah.uuid"]
    assert len(find(["ruler"])) == 13
    assert len(find(["ruler.niah_*"])) == 8
    assert find([]) == []


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'ruler\.vtt'\. Did you mean 'ruler\.vt'\? Valid: .*babilong"
    ):
        find(["ruler.vtt"])
    with pytest.raises(UnknownNameError, match="unknown task 'x\\*'"):
        find(["x*"])


def test_options_reach_the_tasks_that_have_them() -> None:
    vt, uuid = find(["ruler.vt", "niah.uuid"], variant="kvpress", depths="5")
    assert (vt.variant, uuid.depths) == ("kvpress", 5)  # type: ignore[attr-defined]
    with pytest.raises(UnknownNameError, match=r"unknown task option 'dephts'.*variant"):
        find(["ruler", "niah"], dephts=5)
    with pytest.raises(OptionError, match="variant='mine'"):
        find(["ruler"], variant="mine")
    with pytest.raises(OptionError, match="depths='many'"):
        find(["niah"], depths="many")
    assert find(["ruler.vt"])[0] == tasks()["ruler.vt"]


@pytest.mark.parametrize("name", LOCAL)
def test_every_task_keeps_its_promises(name: str, smol: Tokenizer, data: Path) -> None:
    task, length = tasks()[name], 2600
    samples = list(task.samples(smol, length=length, count=2, seed=1, data=data))
    assert len({sample.id for sample in samples}) == 2
    if name == groups()[task.group][0]:
        assert list(task.samples(smol, length=length, count=1, seed=1, data=data)) == samples[:1]
    for sample in samples:
        assert sample.task == name
        assert Room(smol, length, markup=True).left(sample) >= 0
        assert sample.context.strip()
        assert sample.scorer in {*SCORERS, SCORER}
        assert all(turn.answers and all(turn.answers) and turn.max_new_tokens > 0 for turn in sample.turns)
        assert sample.scorer == SCORER or all(turn.question.strip() for turn in sample.turns)


@pytest.mark.parametrize("name", MADE)
def test_some_need_no_data(name: str, words: Tokenizer, no_data: None) -> None:
    assert next(tasks()[name].samples(words, length=3000, count=1, seed=1, data=None)).context


@pytest.mark.parametrize("name", [name for name in LOCAL if name not in MADE])
def test_the_others_say_what_to_get(name: str, words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not in the data folder .* Get .* and put it there"):
        next(tasks()[name].samples(words, length=3000, count=1, seed=1, data=tmp_path))
