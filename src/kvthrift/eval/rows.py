"""Rows of results in an append-only file, one JSON line each, that a kill at any moment leaves whole.

A row is written and flushed to the disk at once. A last line that was cut off or garbled is removed when the file is
opened again, and what it held is measured again; a damaged line anywhere else is refused. Knows nothing of what a row
means.
"""

from __future__ import annotations

import json
import math
import os
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

from kvthrift.errors import RunError

Row = dict[str, Any]

MANY = 8  # floats in a list that are worth an array
SHORT = 64  # characters of a text that other rows may have, too


def read_rows(path: Path, change: Callable[[Row], Row] = lambda row: row) -> list[Row]:
    """The whole rows of a file, which is left as it is; a damaged last line is passed over.

    Args:
        change: done to each row as it is read.

    Raises:
        RunError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        with path.open("rb") as file:
            return _whole(path, file, change)[0]
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
            rows, size, ended = _whole(path, file, lambda row: row)
            file.truncate(size)
            if not ended:  # killed between a row and its end of line
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


def _whole(path: Path, lines: BinaryIO, change: Callable[[Row], Row]) -> tuple[list[Row], int, bool]:
    """The rows in a file, how many bytes they take, and whether the last one is ended."""
    rows: list[Row] = []
    size, ended = 0, True
    for number, line in enumerate(lines, 1):  # ends at \n alone
        row = _row(line)
        if row is None:
            if next(lines, None) is not None:
                raise RunError(
                    f"line {number} of {path} is damaged, and it is not the last one, so a kill did not do it. Restore "
                    "the file, or remove that line to measure its sample again."
                )
            break
        rows.append(change(row))
        size, ended = size + len(line), line.endswith(b"\n")
    return rows, size, ended


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def slim(value: Any) -> Any:
    """The same in a fraction of the memory: short texts and keys shared by all rows, floats in arrays."""
    if isinstance(value, dict):
        return {sys.intern(key): slim(item) for key, item in value.items()}
    if isinstance(value, list):
        floats = len(value) >= MANY and all(type(item) is float for item in value)
        return array("d", value) if floats else [slim(item) for item in value]
    return sys.intern(value) if isinstance(value, str) and len(value) <= SHORT else value


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
