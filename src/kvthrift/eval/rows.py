"""Rows of results in an append-only file, one JSON line each, that a kill at any moment leaves whole.

A row is written and flushed to the disk at once. A last line that was cut off or garbled is removed when the file is
opened again, and what it held is measured again; a damaged line anywhere else is refused. Knows nothing of what a row
means.
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, Self

from kvthrift.errors import RunError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file, which is left as it is; a damaged last line is passed over.

    Raises:
        RunError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        return _whole(path, path.read_bytes())[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error


class RowFile:
    """An open file of rows; use as a context.

    Attributes:
        found: rows that were there when it was opened.
        count: rows that are there now.
    """

    def __init__(self, path: Path, file: BinaryIO, found: list[Row]) -> None:
        self.path = path
        self.found = found
        self.count = len(found)
        self._file = file

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for appending, and repair what a killed run left.

        Raises:
            RunError: the file cannot be written, or a line before the last is damaged.
        """
        try:
            file = path.open("a+b")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            file.seek(0)
            data = file.read()
            rows, size = _whole(path, data)
            file.truncate(size)
            if size and not data[:size].endswith(b"\n"):  # killed between a row and its end of line
                _write(file, b"\n")
            return cls(path, file, rows)
        except BaseException:
            file.close()
            raise

    def append(self, row: Row) -> None:
        """Add a row; it is on the disk when this returns.

        Raises:
            RunError: the disk is full or gone.
        """
        line = json.dumps(_finite(row), allow_nan=False)
        try:
            _write(self._file, line.encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}. Make room and start again; the run goes on from "
                "there."
            ) from error
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _whole(path: Path, data: bytes) -> tuple[list[Row], int]:
    """The rows in ``data``, and how many bytes they take."""
    rows: list[Row] = []
    size = 0
    lines = io.BytesIO(data).readlines()  # ends at \n alone
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None and number < len(lines):
            raise RunError(
                f"line {number} of {path} is damaged, and it is not the last one, so a kill did not do it. Restore "
                "the file, or remove that line to measure its sample again."
            )
        if row is None:
            break
        rows.append(row)
        size += len(line)
    return rows, size


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
