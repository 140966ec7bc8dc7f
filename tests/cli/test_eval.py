"""``kvthrift eval`` and ``kvthrift report``: a grid from flags or a file, its tables, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import byte_tokenizer, save_model
from typer.testing import Result

import kvthrift.cli.eval as verb
from kvthrift.eval.folder import read_run

Run = Callable[..., Result]

GRID = (
    "--methods", "snapkv,full", "--budgets", "64,50%", "--tasks", "niah.number", "--length", "600", "--samples", "2",
    "--hide-question", "-o", "snapkv.window=8", "--page", "16", "--task-option", "haystack=filler",
)  # fmt: skip
TOML = """
methods = ["snapkv", "full"]
budgets = [64, "50%"]
tasks = ["niah.number"]
length = 600
samples = 2
question = "visible"
page = 16

[options.snapkv]
window = 8

[task_options]
haystack = "filler"
"""


@pytest.fixture
def evaluate(kvthrift: Run, model_folder: Path, tmp_path: Path) -> Run:
    """``kvthrift eval`` on the tiny model, into ``tmp_path / "run"``."""

    def run(*words: object) -> Result:
        return kvthrift("eval", "--model", model_folder, "--out", tmp_path / "run", *words)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder of a finished run."""
    from tests.cli.conftest import CliRunner, app

    path = tmp_path_factory.mktemp("finished") / "run"
    words = ["eval", "--model", str(model_folder), "--out", str(path), *GRID]
    assert CliRunner().invoke(app, words).exit_code == 0
    return path


def test_flags_and_a_file_say_the_same(evaluate: Run, finished: Path, tmp_path: Path) -> None:
    config = tmp_path / "grid.toml"
    config.write_text(TOML)
    result = evaluate("--config", config, "--hide-question")  # a flag overrides the file
    assert result.exit_code == 0, result.stderr
    ours, theirs = read_run(tmp_path / "run"), read_run(finished)
    assert ours.grid == theirs.grid
    assert len(ours.rows) == len(theirs.rows) == 2 * 7
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_what_is_printed(evaluate: Run, kvthrift: Run, tmp_path: Path) -> None:
    result = evaluate(*GRID)
    assert result.exit_code == 0, result.stderr
    for said in (
        "question hidden",
        "snapkv@64",
        "random@50% (control)",
        "full (control)",
        "bytes held",
        "niah.number 2",
    ):
        assert said in result.stdout
    assert kvthrift("report", tmp_path / "run").stdout == result.stdout
    again = evaluate(*GRID, "--format", "json")
    (found,) = json.loads(again.stdout)
    assert len(found["sessions"]) == 2
    assert len(read_run(tmp_path / "run").rows) == 14


def test_workers_make_the_same_tables(evaluate: Run, kvthrift: Run, tmp_path: Path, finished: Path) -> None:
    result = evaluate(*GRID, "--workers", "2")
    assert result.exit_code == 0, result.stderr
    ours, theirs = read_run(tmp_path / "run"), read_run(finished)
    assert ours.grid == theirs.grid
    assert [row.get("workers") for row in ours.rows] == [None] * 7 + [2] * 7  # the timed sample comes first
    passing = {"seconds": 0, "workers": 0}
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert {**one, **passing} == {**other, **passing}


def test_less_can_be_measured(evaluate: Run, tmp_path: Path) -> None:
    less = ("--no-agreement", "--no-physics", "--max-new-tokens", "3", "--samples", "1")
    result = evaluate(*GRID, *less)
    assert result.exit_code == 0, result.stderr
    rows = read_run(tmp_path / "run").rows
    assert {(row["agreement"], row["physics"], *row["new_tokens"]) for row in rows} == {(None, None, 3)}


def test_reports(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    assert kvthrift("report", finished).stdout.startswith("# run\n")
    assert kvthrift("report", finished, finished, "--format", "csv").stdout.count("\n") == 1 + 2 * 7 * 2
    assert json.loads(kvthrift("report", finished, "--format", "json").stdout)[0]["grid"]["length"] == 600
    out = tmp_path / "report.md"
    assert kvthrift("report", finished, "--out", out).exit_code == 0
    assert out.read_text().startswith("# run\n")
    again = kvthrift("report", finished, "--out", out)
    assert again.exit_code == 2
    assert "there already" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "rular"), "unknown task 'rular'. Did you mean 'ruler'"),
        (("--tasks", ""), "tasks is empty"),
        (("--methods", "snapvk"), "Did you mean 'snapkv'"),
        (("--budgets", "lots"), "budget 'lots' cannot be read"),
        (("--budgets", "4"), "gives 4 entries"),
        (("--length", "2000"), "reads at most 1024"),
        (("--length", "30"), "too short for task niah.number"),
        (("--tasks", "niah.number,longbench.qasper", "--data", "/nowhere"), "/nowhere"),
        (("-o", "window=8"), "does not say whose it is"),
        (("-o", "snapkv.window"), "has no value"),
        (("-o", "snapkv.windows=3"), "Did you mean 'window'"),
        (("--task-option", "hay=3"), "unknown task option 'hay'"),
        (("--question", "visible"), "contradict each other"),
        (("--workers", "2", "--separate-prefill"), "seconds mean nothing while other workers run"),
        (("--format", "pdf"), "Valid: md, html, csv, json"),
        (("--config", "none.toml"), "none.toml cannot be read"),
        (("--model", "none/such/model"), "no folder"),
    ],
)
def test_bad_input_is_one_sentence(evaluate: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    result = evaluate(*GRID, *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_another_grid_is_refused(evaluate: Run, finished: Path) -> None:
    before = (finished / "rows.jsonl").read_bytes()
    result = evaluate(*GRID, "--samples", "3", "--out", finished)
    assert result.exit_code == 2
    assert "another grid (samples 2 instead of 3)" in " ".join(result.stderr.split())
    assert (finished / "rows.jsonl").read_bytes() == before


def test_another_model_is_refused(kvthrift: Run, model_folder: Path, tmp_path: Path) -> None:
    from shutil import copytree, rmtree

    home = copytree(model_folder, tmp_path / "model")
    words = ("eval", "--model", home, "--out", tmp_path / "run", *GRID, "--samples", "1")
    assert kvthrift(*words).exit_code == 0
    rmtree(home)
    save_model(home, "qwen2")
    result = kvthrift(*words)
    assert result.exit_code == 2
    assert "other weights" in " ".join(result.stderr.split())


def test_a_report_of_nothing_is_refused(kvthrift: Run, finished: Path, tmp_path: Path) -> None:
    assert "not a run's folder" in " ".join(kvthrift("report", tmp_path).stderr.split())
    (tmp_path / "grid.toml").write_bytes((finished / "grid.toml").read_bytes())
    result = kvthrift("report", tmp_path)
    assert result.exit_code == 2
    assert "holds no rows" in " ".join(result.stderr.split())


def test_a_tokenizer_without_chat_template(kvthrift: Run, model_folder: Path, tmp_path: Path) -> None:
    from shutil import copytree

    home = copytree(model_folder, tmp_path / "model")
    (home / "chat_template.jinja").unlink(missing_ok=True)
    byte_tokenizer().save_pretrained(home)
    result = kvthrift("eval", "--model", home, "--out", tmp_path / "run", *GRID, "--samples", "1", "--methods", "full")
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in " ".join(result.stderr.split())
    assert "Note: the tokenizer has no chat template" in result.stdout


def test_an_interrupt_keeps_rows(evaluate: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = verb.Runner.run

    def stops(self: Any, folder: Any) -> None:
        append, count = folder.rows.append, []

        def third(row: Any) -> None:
            append(row)
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(folder.rows, "append", third)
        real(self, folder)

    monkeypatch.setattr(verb.Runner, "run", stops)
    result = evaluate(*GRID)
    assert result.exit_code == 130
    assert "3 rows are kept" in " ".join(result.stderr.split())
    monkeypatch.setattr(verb.Runner, "run", real)
    assert evaluate(*GRID).exit_code == 0
    assert len(read_run(tmp_path / "run").rows) == 14
