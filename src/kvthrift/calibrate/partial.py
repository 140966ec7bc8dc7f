"""Results of single samples, kept beside the file they are for until it is written.

One line a sample, a checksum before it, appended and flushed to the disk; a line that a killed run left
half-written is cut off. One run at a time: the file is locked while it is open. Knows nothing of what a
result is beyond that it is plain data.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from zlib import crc32

from kvthrift.errors import CalibrationError

FORMAT = 1


class Partial:
    """The open file of a run; use as a context. ``results`` holds what earlier runs and this one have."""

    def __init__(self, path: Path, file: BinaryIO, results: list[dict[str, Any]]) -> None:
        self.path = path
        self.results = results
        self._file = file

    @classmethod
    def open(cls, target: str | Path, settings: Mapping[str, Any], *, force: bool = False) -> Self:
        """Go on from the results kept for ``target``, or begin.

        Args:
            target: the file the results are for.
            settings: what every result depends on; results of other settings are not used.
            force: begin anew where results of other settings are kept.

        Raises:
            CalibrationError: results of other settings are kept, they are damaged, another run has them open,
                or they cannot be written.
        """
        path = Path(f"{target}.partial")
        try:
            file = path.open("a+b")
        except OSError as error:
            raise CalibrationError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            _lock(file, path)
            return cls(path, file, _resume(file, path, dict(settings), force))
        except BaseException:
            file.close()
            raise

    def add(self, result: dict[str, Any]) -> None:
        """Keep one more result.

        Raises:
            CalibrationError: the disk is full.
        """
        try:
            _append(self._file, result)
        except OSError as error:
            raise CalibrationError(
                f"{self.path} cannot be written: {error.strerror}. Make room and start again; the run "
                "goes on from there."
            ) from error
        self.results.append(result)

    def remove(self) -> None:
        """Forget the results: what they were for is written."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CalibrationError(
            f"another run is writing {path}, so this one cannot. Wait for it, or give another name."
        ) from error
    if not os.fstat(file.fileno()).st_nlink:  # that run ended between our opening and locking, and removed it
        raise CalibrationError(f"another run has just finished with {path}. Look at its result, or start again.")


def _resume(file: BinaryIO, path: Path, settings: dict[str, Any], force: bool) -> list[dict[str, Any]]:
    """The results in the file, which is cut behind the last whole line and begun anew where it must be."""
    header = {"format": FORMAT, **settings}
    file.seek(0)
    whole = [line for line in file.readlines() if line.endswith(b"\n")]
    found = [_read(line) for line in whole]
    trouble = _trouble(found, header)
    if trouble and not force:
        raise CalibrationError(
            f"{path} {trouble}, so the run cannot go on from it. Remove it, or use force to begin anew."
        )
    if trouble:
        found, whole = [], []
    file.truncate(sum(map(len, whole)))
    if not found:
        _append(file, header)
    return [result for result in found[1:] if result is not None]


def _trouble(found: list[dict[str, Any] | None], header: dict[str, Any]) -> str:
    """What speaks against going on from these lines; empty if nothing does."""
    if None in found:
        return "is damaged"
    old = (found[0] if found else None) or header
    keys = [key for key in sorted(old.keys() | header.keys()) if old.get(key) != header.get(key)]
    changes = ", ".join(f"{key} {old.get(key)} instead of {header.get(key)}" for key in keys)
    return f"holds results of a run with other settings ({changes})" if changes else ""


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    text = json.dumps(line).encode()
    file.write(b"%08x %s\n" % (crc32(text), text))
    file.flush()
    os.fsync(file.fileno())


def _read(line: bytes) -> dict[str, Any] | None:
    """A line's content, or None if it is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % crc32(text):
        return None
    content: dict[str, Any] = json.loads(text)
    return content
