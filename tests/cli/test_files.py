"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvthrift import RecipeError
from kvthrift.cli.files import write_whole


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("old", encoding="utf-8")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(RecipeError, match=r"cannot be written \(No space left on device\)"):
        write_whole(file, "new", force=True)
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    write_whole(file, "é\n", force=False)
    assert file.read_text(encoding="utf-8") == "é\n"
    assert file.stat().st_mode & 0o777 == 0o644
