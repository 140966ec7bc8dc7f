"""The folder of local data sets: finding a file, reading its rows, and saying what to get where it is missing.

Knows nothing of any data set or task.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kvthrift.errors import DataError

VARIABLE = "KVTHRIFT_DATA"
"""Environment variable that names the data folder where none is given."""


def optional_folder(data: Path | None) -> Path | None:
    """The data folder, or None where none is named."""
    named = data or os.environ.get(VARIABLE)
    return Path(named) if named else None


def folder(data: Path | None, *, get: str) -> Path:
    """The data folder.

    Raises:
        DataError: none is named, or it is not there.
    """
    path = optional_folder(data)
    if path is None:
        raise DataError(
            f"no data folder is named, so {get} cannot be read. Name the folder that holds it, or set {VARIABLE}."
        )
    if not path.is_dir():
        raise DataError(f"the data folder {path} does not exist, so {get} cannot be read. Name one that does.")
    return path


def find(data: Path | None, *names: str, get: str) -> Path:
    """The first file of these names in the data folder, as it is or gzipped.

    Args:
        data: the data folder, or None for the environment's.
        names: paths inside it, best first.
        get: what the file holds and where it comes from, for the error.

    Raises:
        DataError: none of them is there.
    """
    home = folder(data, get=get)
    for name in names:
        for path in (home / name, home / f"{name}.gz"):
            if path.is_file():
                return path
    wanted = " or ".join(names)
    raise DataError(
        f"{wanted} is not in the data folder {home}, so its task has no samples. Get {get} and put it there."
    )


def text(path: Path) -> str:
    """The text of a file, gzipped or not.

    Raises:
        DataError: the file is damaged.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}), so its task has no samples. Get the file again.") from error


class Row(dict[str, Any]):
    """An object of a data file; asking for a field it does not have says which file is not what it should be."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        super().__init__(fields)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise DataError(
            f"a row of {self._path} has no field {name!r} (it has {', '.join(sorted(self))}), so it is not the file "
            "that its task reads. Get the published one."
        )


def document(path: Path) -> Any:
    """A JSON file; its objects are :class:`Row`.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return json.loads(text(path), object_hook=lambda fields: Row(fields, path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}), so its task has no samples. Get the file again.") from error


def rows(path: Path, *, broken: Collection[int] = ()) -> Iterator[Row]:
    """The objects of a JSON-lines file.

    Args:
        path: the file.
        broken: numbers of lines (from 1) that are known to be damaged at the source; they are left out.

    Raises:
        DataError: another line is damaged.
    """
    for number, line in enumerate(text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:  # strict=False: published files have raw control characters in strings
            row = json.loads(line, strict=False, object_hook=lambda fields: Row(fields, path))
        except json.JSONDecodeError as error:
            if number in broken:
                continue
            raise DataError(
                f"line {number} of {path} is not JSON ({error.msg}), so its task has no samples. Get the file again."
            ) from error
        if not isinstance(row, Row):
            raise DataError(
                f"line {number} of {path} is no JSON object, so its task has no samples. Get the file again."
            )
        yield row
