"""Rows survive a kill at any byte."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from kvthrift.errors import RunError
from kvthrift.eval.rows import RowFile, read_rows

ROWS = [{"number": n, "text": "a\nb\u2028 \r é" * n, "nested": {"x": [1.5, None]}} for n in range(4)]


def written(path: Path, rows: list[dict[str, object]] = ROWS) -> bytes:
    with RowFile.open(path) as file:
        for row in rows:
            file.append(row)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = written(path)
    assert read_rows(path) == ROWS
    assert [json.loads(line) for line in data.splitlines()] == ROWS
    with RowFile.open(path) as again:
        assert again.found == ROWS
    assert path.read_bytes() == data


def test_a_file_cut_at_any_byte_loses_its_last_row_at_most(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = written(path)
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        complete = bool(cut) and data[cut : cut + 1] == b"\n"  # only the end of the line is missing
        assert read_rows(path) == ROWS[: whole + complete]
        assert path.read_bytes() == data[:cut]  # reading repairs nothing
        with RowFile.open(path) as file:
            assert file.found == ROWS[: whole + complete]
            for row in ROWS[whole + complete :]:
                file.append(row)
        assert path.read_bytes() == data


@pytest.mark.parametrize("rubbish", [b"\x00" * 20, b'{"number": 7', b'{"number": 7,,}\n', b"[1, 2]\n", b"\xff\xfe\n"])
def test_a_garbled_last_line_is_removed(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    data = written(path)
    path.write_bytes(data + rubbish)
    with RowFile.open(path) as file:
        assert file.found == ROWS
    assert path.read_bytes() == data


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"oops\n", *lines[2:]]))
    before = path.read_bytes()
    for open_it in (read_rows, RowFile.open):
        with pytest.raises(RunError, match="line 2"):
            open_it(path)
    assert path.read_bytes() == before


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path, [{"kl": [float("inf"), 1.0], "x": {"y": float("nan")}}])
    assert read_rows(path) == [{"kl": [None, 1.0], "x": {"y": None}}]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []
    with pytest.raises(RunError, match="cannot be"):
        read_rows(tmp_path)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RowFile.open(tmp_path / "rows.jsonl") as file:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"No space left on device.*goes on from there"):
            file.append(ROWS[0])
