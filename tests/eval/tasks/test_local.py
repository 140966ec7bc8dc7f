"""Local files: found, read, or refused with a sentence."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kvthrift.errors import DataError
from kvthrift.eval.tasks import local


def test_plain_and_gzipped_rows_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n{"x": 2}'))
    for name in ("a.jsonl", "b.jsonl"):
        assert list(local.rows(local.find(tmp_path, name, get="it"))) == [{"x": 1}, {"x": 2}]


def test_missing_files_say_what_to_get_and_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set/x\.jsonl is not in the data folder .*Get the set of X and put it there"):
        local.find(tmp_path, "set/x.jsonl", get="the set of X")


def test_no_folder_is_an_error_too(no_data: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data folder is named, so X cannot be read.*KVTHRIFT_DATA"):
        local.find(None, "x", get="X")
    with pytest.raises(DataError, match="does not exist"):
        local.find(tmp_path / "nowhere", "x", get="X")


def test_broken_lines_are_named_unless_known(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"x": 1}\n{"x": \n{"x": 3}\n[4]\n')
    with pytest.raises(DataError, match=r"line 2 of .* is not JSON"):
        list(local.rows(path))
    with pytest.raises(DataError, match=r"line 4 of .* is no JSON object"):
        list(local.rows(path, broken=(2,)))


def test_missing_fields_are_named_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": {"stem": "?"}}\n')
    row = next(local.rows(path))
    with pytest.raises(DataError, match="no field 'answer' \\(it has question\\)"):
        row["answer"]
    with pytest.raises(DataError, match="no field 'choices' \\(it has stem\\)"):
        row["question"]["choices"]


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        local.text(tmp_path / "x.gz")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        local.document(tmp_path / "x.json")
