"""Commands tell a recipe that cuts the text at its punctuation which tokens it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


@pytest.mark.parametrize("more", [(), ("--hide-question",), ("--chunk", 100), ("--chunk", 100, "--hide-question")])
def test_run_knows_the_segments(ask: Run, more: tuple[str, ...]) -> None:
    found = ask("--method", "sablock", "--budget", 64, "--json", *more)
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["entries_after"] < said["entries_before"]


def test_inspect_knows_the_segments(kvthrift: Run, model_folder: Path, text: Path) -> None:
    common = ("--model", model_folder, "--context", text, "--max-new-tokens", 4, "--page", 16, "--question", "why?")
    found = kvthrift("inspect", *common, "--method", "sablock", "--budget", 64, "--json")
    assert found.exit_code == 0, found.output


def test_eval_knows_the_segments(kvthrift: Run, model_folder: Path, tmp_path: Path) -> None:
    grid = ("--methods", "sablock", "--budgets", 64, "--tasks", "niah.number", "--samples", 1, "--length", 700)
    found = kvthrift("eval", "--model", model_folder, *grid, "--out", tmp_path / "run", "--quiet")
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row.get("error") or row.get("failure")]
    assert any("sablock" in json.dumps(row) for row in rows)
