"""``kvthrift report`` to a page: which format an ending names, what is refused, and that nothing is left half done."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import Run
from tests.eval.report.pages import GRID, SESSION, write
from tests.tune.pages import write_study

from kvthrift.eval.arm import arms
from kvthrift.eval.folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "first")


def test_an_ending_names_the_format(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    for name, begins in (
        ("a.html", "<!doctype html>"),
        ("a.HTML", "<!doctype html>"),
        ("a.csv", "run,"),
        ("a.txt", "# first"),
    ):
        out = tmp_path / name
        assert kvthrift("report", finished, "--out", out, "--force").exit_code == 0
        assert out.read_text(encoding="utf-8").startswith(begins)


def test_the_format_that_is_asked_for_counts(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert kvthrift("report", finished, "--format", "md", "--out", out).exit_code == 0
    assert out.read_text(encoding="utf-8").startswith("# first")
    assert kvthrift("report", finished, "--format", "html").stdout.startswith("<!doctype html>")


def test_a_page_is_not_overwritten(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine", encoding="utf-8")
    assert kvthrift("report", finished, "--out", out).exit_code == 2
    assert out.read_text(encoding="utf-8") == "mine"


def test_no_rows_no_page(kvthrift: Run, tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "empty", GRID, arms(GRID), SESSION).__exit__()
    result = kvthrift("report", tmp_path / "empty", "--out", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "holds no rows" in " ".join(result.stderr.split())
    assert not (tmp_path / "page.html").exists()


def test_a_search_is_reported_in_every_format(kvthrift: Run, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    for format, said in (("md", "| 3 | 75.0%"), ("csv", "study,judges"), ("json", '"judges"'), ("html", "<!doctype")):
        result = kvthrift("report", study, "--format", format)
        assert result.exit_code == 0, result.stderr
        assert said in result.stdout


def test_searches_and_runs_are_not_mixed(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    result = kvthrift("report", write_study(tmp_path / "study"), finished)
    assert result.exit_code == 2
    assert "runs or searches" in " ".join(result.stderr.split())
