"""A run's folder belongs to one grid, one model and one writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.eval.toys import grid

from kvthrift import method
from kvthrift.errors import RunError
from kvthrift.eval.arm import arms
from kvthrift.eval.config import Grid
from kvthrift.eval.folder import GRID, ROWS, RunFolder, read_run

SESSION = {"weights": "abc", "command": "kvthrift eval", "commit": "1234567"}


def begin(path: Path, made: Grid | None = None, session: dict[str, str] = SESSION) -> int:
    """Open a folder and close it again; the number of this start."""
    made = made or grid()
    with RunFolder.open(path, made, arms(made), session) as folder:
        return folder.session


def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    assert begin(path) == 0
    assert begin(path, session={**SESSION, "commit": "89abcde"}) == 1
    run = read_run(path)
    assert run.grid == grid()
    assert [(arm.name, arm.recipe, arm.control) for arm in run.arms] == [
        (arm.name, arm.recipe, arm.control) for arm in arms(grid())
    ]
    assert [session["commit"] for session in run.sessions] == ["1234567", "89abcde"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 4}, "samples 2 instead of 4"),
        ({"budgets": ["48", "64"]}, "budgets"),
        ({"options": {"snapkv": {"window": 4}}}, "options"),
        ({"question": "hidden"}, "question 'visible' instead of 'hidden'"),
    ],
)
def test_another_grid_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    begin(tmp_path)
    before = (tmp_path / GRID).read_bytes()
    with pytest.raises(RunError, match=said):
        begin(tmp_path, grid(**changes))
    assert (tmp_path / GRID).read_bytes() == before
    begin(tmp_path)  # and let go of the lock


def test_a_changed_recipe_file_is_refused(tmp_path: Path) -> None:
    file, run = tmp_path / "mine.toml", tmp_path / "run"
    method("knorm", budget=48).with_options(name="mine").save(file)
    made = grid(recipes=[str(file)])
    begin(run, made)
    method("keydiff", budget=48).with_options(name="mine").save(file)
    with pytest.raises(RunError, match="a recipe that was changed"):
        begin(run, made)


def test_another_model_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(RunError, match="other weights"):
        begin(tmp_path, session={**SESSION, "weights": "def"})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"thesis\.tex but no grid\.toml"):
        begin(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        begin(tmp_path / "file")


@pytest.mark.parametrize("text", ["grid = [", "format = 1\n", "\ufffd\x00"])
def test_a_damaged_grid_is_refused(tmp_path: Path, text: str) -> None:
    begin(tmp_path)
    (tmp_path / GRID).write_text(text)
    for open_it in (begin, read_run):
        with pytest.raises(RunError, match=r"grid\.toml"):
            open_it(tmp_path)


def test_only_one_writes(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, grid(), arms(grid()), SESSION) as folder:
        folder.rows.append({"x": 1})
        with pytest.raises(RunError, match="another process"):
            begin(tmp_path)
        assert read_run(tmp_path).rows == ({"x": 1},)  # but all may read
    begin(tmp_path)


def test_a_kill_before_the_first_row_is_no_harm(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / ROWS).unlink()
    assert begin(tmp_path) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").touch()
    (tmp_path / "other" / ".lockabc").touch()  # a grid.toml that was being written
    assert begin(tmp_path / "other") == 0


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run's folder"):
        read_run(tmp_path)
