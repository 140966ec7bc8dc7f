"""What caches held right after they were compressed: a record for each arm of a few samples, beside the rows of a run.

Lines are appended as rows are (:mod:`kvthrift.eval.rows`), and always before the row they belong to, so that a run that
is killed at any moment has a snapshot of every row it was to have one of. Knows nothing of models or caches.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvthrift.errors import RunError
from kvthrift.eval.rows import RowFile, read_rows

SNAPSHOTS = "snapshots.jsonl"

Key = tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One cache of one sequence, right after it was compressed. L layers, H KV heads, T tokens read.

    Attributes:
        task, sample: whose prompt it is.
        question: "visible" (read, and compressed, with the context) or "hidden".
        arm: unique among the arms of a comparison: ``snapkv@512``.
        budget: as it was asked for; "all" for the full cache.
        method: the recipe's name.
        tokens: the text of each of the T tokens that were read; joined, they are the whole text. A token that ends
            inside a character has none, and the token that completes it has all of it.
        answer_spans: where the gold answer stands among them, ``(start, stop)`` in tokens; empty if it does not.
        layers: the model's own numbers of the L layers, in order; those that keep transformers' own cache (sliding
            windows, linear attention) are not among them.
        heads: H.
        lengths: ``[L][H]`` entries held.
        kept: ``[L, H, T]``, whether that head of that layer holds the entry of that token; a layer left whole holds
            all.
        answer: what was answered from this cache, to the first question.
        full_answer: the same of the full cache; empty if it has none.
    """

    task: str
    sample: str
    question: str
    arm: str
    budget: str
    method: str
    tokens: tuple[str, ...]
    answer_spans: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    heads: int
    lengths: tuple[tuple[int, ...], ...]
    kept: NDArray[np.bool_]
    answer: str
    full_answer: str

    @property
    def key(self) -> Key:
        """What no two snapshots of a run share."""
        return self.task, self.sample, self.question, self.arm

    @property
    def shares(self) -> NDArray[np.float64]:
        """``[T]``: of all heads of all layers, the share that holds each token."""
        shares: NDArray[np.float64] = self.kept.mean(axis=(0, 1))
        return shares

    def plain(self) -> dict[str, Any]:
        """This snapshot as plain data; ``kept`` as base64 of its zlib-compressed bits, in C order."""
        kept = base64.b64encode(zlib.compress(np.packbits(self.kept, axis=None).tobytes())).decode("ascii")
        rest = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "kept"}
        return rest | {"kept": kept}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`plain`.

        Raises:
            KeyError, TypeError, ValueError: the data is not that of a snapshot.
        """
        shape = (len(data["layers"]), int(data["heads"]), len(data["tokens"]))
        try:
            bits = np.frombuffer(zlib.decompress(base64.b64decode(data["kept"], validate=True)), dtype=np.uint8)
        except (zlib.error, binascii.Error) as error:
            raise ValueError(f"kept is garbled: {error}") from error
        count = int(np.prod(shape))
        if len(bits) != -(-count // 8):
            raise ValueError(f"kept has {len(bits)} bytes, but {shape} need {-(-count // 8)}")
        return cls(**data | {
            "tokens": tuple(data["tokens"]),
            "answer_spans": tuple((int(start), int(stop)) for start, stop in data["answer_spans"]),
            "layers": tuple(data["layers"]),
            "lengths": tuple(map(tuple, data["lengths"])),
            "kept": np.unpackbits(bits, count=count).astype(bool).reshape(shape),
        })  # fmt: skip


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a run's folder, which is left as it is; none if the run makes none.

    Raises:
        RunError: the file cannot be read, or is damaged elsewhere than in its last line.
    """
    path = folder / SNAPSHOTS
    return [_snapshot(path, number, row) for number, row in enumerate(read_rows(path), 1)]


class SnapshotFile:
    """The snapshots of a run, open for adding to."""

    def __init__(self, file: RowFile) -> None:
        self._file = file
        self._keys: set[Key] = {_snapshot(file.path, number, row).key for number, row in enumerate(file.found, 1)}
        file.found.clear()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open for appending, and repair what a killed run left.

        Raises:
            RunError: the file cannot be written, or is damaged elsewhere than in its last line.
        """
        file = RowFile.open(folder / SNAPSHOTS)
        try:
            return cls(file)
        except BaseException:
            file.__exit__()
            raise

    def add(self, snapshot: Snapshot) -> None:
        """Keep a snapshot, unless there is one of that sample and arm; it is on the disk when this returns.

        Raises:
            RunError: the disk is full or gone.
        """
        if snapshot.key not in self._keys:
            self._file.append(snapshot.plain())
            self._keys.add(snapshot.key)

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__()


def _snapshot(path: Path, number: int, row: dict[str, Any]) -> Snapshot:
    try:
        return Snapshot.from_plain(row)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"line {number} of {path} is no snapshot ({error}), so what that cache held cannot be shown. Remove the "
            "line, or begin in another folder."
        ) from error
