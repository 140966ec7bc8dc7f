"""Grids from TOML and from flags."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kvthrift.errors import KvthriftError, OptionError, RunError, UnknownNameError
from kvthrift.eval.config import Grid, read_config


def test_lists_may_be_texts() -> None:
    made = Grid.build({"tasks": "ruler, niah,ruler", "budgets": "128,10%", "methods": ["full", "snapkv"]})
    assert made.tasks == ("ruler", "niah")
    assert made.budgets == ("128", "10%")
    assert made.methods == ("full", "snapkv")
    assert Grid.build({"tasks": "x", "budgets": [128, "1KiB"]}).budgets == ("128", "1KiB")


def test_survives_toml(tmp_path: Path) -> None:
    made = Grid.build({
        "tasks": "a", "options": {"snapkv": {"window": 8}}, "task_options": {"mode": "x", "turns": 2},
        "question": "both",
    })  # fmt: skip
    path = tmp_path / "grid.toml"
    path.write_text(tomli_w.dumps(made.plain()))
    assert Grid.build(read_config(path)) == made
    assert tomllib.loads(tomli_w.dumps(made.plain())) == made.plain()


def test_question() -> None:
    assert Grid.build({"tasks": "a"}).visibilities == (True,)
    assert Grid.build({"tasks": "a", "question": "hidden"}).visibilities == (False,)
    assert Grid.build({"tasks": "a", "question": "both"}).visibilities == (False, True)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({}, OptionError, "no tasks"),
        ({"tasks": ""}, OptionError, "tasks is empty"),
        ({"tasks": "a", "sample": 3}, UnknownNameError, "Did you mean 'samples'"),
        ({"tasks": "a", "samples": "many"}, OptionError, "samples='many'"),
        ({"tasks": "a", "samples": 0}, OptionError, "samples=0"),
        ({"tasks": "a", "length": -1}, OptionError, "length=-1"),
        ({"tasks": "a", "question": "perhaps"}, OptionError, "perhaps"),
        ({"tasks": "a", "budgets": ""}, OptionError, "budgets is empty"),
        ({"tasks": "a", "alone": -2}, OptionError, "alone=-2"),
        ({"tasks": "a", "options": 3}, OptionError, "one table a method"),
        ({"tasks": "a", "task_options": {"x": [1]}}, OptionError, "single values"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], error: type[KvthriftError], said: str) -> None:
    with pytest.raises(error, match=said):
        Grid.build(values)


def test_only_the_full_cache_needs_no_budget() -> None:
    assert Grid.build({"tasks": "a", "methods": "full", "budgets": ""}).budgets == ()


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("tasks = [")
    with pytest.raises(RunError, match="not TOML"):
        read_config(tmp_path / "bad.toml")
