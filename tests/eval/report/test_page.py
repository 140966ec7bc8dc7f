"""Pages as text: what they say, that it is what the Markdown says, and that nothing in them can run or be fetched."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tests.eval.report.pages import ARMS, NASTY, Reader, keep, page, run, snapshot

from kvthrift.errors import MissingPackageError, RunError
from kvthrift.eval.markdown import markdown
from kvthrift.eval.report import inspect_page, shell
from kvthrift.eval.table import tables


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = keep(tmp_path_factory.mktemp("runs") / "first", snapshot("snapkv@48"), snapshot("h2o@48"))
    return page(run(folder))


def test_numbers_are_those_of_the_markdown(tmp_path: Path) -> None:
    made = run(tmp_path / "x")
    shown = [found for found in Reader(page(made)).tables if found]
    lines = markdown([(made, tables(made))]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert len(rows) == 2 * 4 * (1 + len(ARMS))
    flat = [row for table in shown for row in table]
    assert len(flat) == len(rows)
    for there, (name, _, *here) in zip(rows, flat, strict=True):
        assert [name, *here] == [cell.removesuffix(" (control)").replace(" [", "[") for cell in there]


def test_it_says_with_what_it_was_made(whole: str) -> None:
    for said in ("H200", "bfloat16", "commit 1234567", "torch 2", "transformers 5", "smollm2 (embedded)",
                 "kvthrift eval --tasks toy.word,toy.other --out &#39;&lt;runs&gt;&#39;"):  # fmt: skip
        assert said in whole
    assert whole.count("(question hidden)") >= 10
    assert whole.count("(question visible)") >= 10


def test_nothing_is_fetched(whole: str) -> None:
    read = Reader(whole)
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert "default-src 'none'" in whole
    assert not {"img", "iframe", "object", "embed"} & set(read.tags)


def test_texts_are_never_markup(whole: str) -> None:
    assert NASTY not in whole
    assert "</script><b>" not in whole
    assert Reader(whole).tags.count("script") == 5  # class, filters box, data, library, code


def test_headings_are_in_order(whole: str) -> None:
    levels = Reader(whole).levels
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    made = run(keep(tmp_path / "x", snapshot("snapkv@48")))
    assert page(made) == page(made)


def test_failures_are_listed_with_reasons(whole: str) -> None:
    assert "out of memory, 1\n      sample (005)" in whole
    assert "no room for &lt;script&gt;" in whole


def test_without_snapshots_it_says_how_to_get_them(tmp_path: Path) -> None:
    text = page(run(tmp_path / "x"))
    assert "kvthrift eval --snapshots N" in text
    assert 'id="painted"' not in text


def test_damaged_snapshots_are_refused(tmp_path: Path) -> None:
    (tmp_path / "snapshots.jsonl").write_text('{"task": "x"}\n{"task": "y"}\n', encoding="utf-8")
    with pytest.raises(RunError, match="is no snapshot"):
        page(run(tmp_path))


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    text = page(run(tmp_path / "a" / "x"), run(tmp_path / "b" / "x", "visible", length=320), run(tmp_path / "y"))
    for name in (tmp_path / "a" / "x", tmp_path / "b" / "x", "y"):
        assert f'name="run" value="{name}"' in text
    assert text.count('<section class="group"') == 5
    assert "320 tokens each" in text


def test_a_run_of_one_task_and_question_has_no_filter_for_them(tmp_path: Path) -> None:
    made = run(tmp_path / "x", "visible")
    made = replace(made, rows=tuple(row for row in made.rows if row["task"] == "toy.word"))
    text = page(made)
    assert 'name="question"' not in text
    assert '<select id="filter-task"' not in text
    assert 'name="method"' in text


def test_snapshots_alone_are_a_page() -> None:
    text = inspect_page([snapshot("snapkv@48")], title="Held & <kept>", facts={"model": "<tiny>"})
    assert "<title>Held &amp; &lt;kept&gt;</title>" in text
    assert "&lt;tiny&gt;" in text
    assert NASTY not in text
    assert "No snapshots were given." in inspect_page([], title="x", facts={})


@pytest.mark.parametrize(("name", "gone"), [("plotly", "plotly.offline"), ("jinja2", "jinja2")])
def test_a_missing_package_is_named(name: str, gone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shell._library.cache_clear()
    shell._environment.cache_clear()
    monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(MissingPackageError, match=rf"^{name} is not installed.*pip install 'kvthrift\[report\]'"):
        page(run(tmp_path / "x"))
