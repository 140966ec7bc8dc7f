"""The folder of one run: ``grid.toml`` says what is run and with what, ``rows.jsonl`` holds what came out.

What the caches of a few samples held is in ``snapshots.jsonl`` (:mod:`kvthrift.eval.snapshot`). One run at a time
writes to it. Knows nothing of how rows are made.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tomli_w
from filelock import FileLock, Timeout

from kvthrift.errors import RunError
from kvthrift.eval.arm import Arm
from kvthrift.eval.config import Grid
from kvthrift.eval.provenance import Session
from kvthrift.eval.rows import Row, RowFile, read_rows, slim
from kvthrift.eval.snapshot import SnapshotFile
from kvthrift.recipe import Recipe

FORMAT = 1
GRID, ROWS, LOCK = "grid.toml", "rows.jsonl", ".lock"
DEFAULTS = Grid(tasks=("any",)).plain()  # of keys that a grid of an earlier version lacks
FREE = ("snapshots",)  # keys of a grid that change no row, so that a later start may change them


@dataclass(frozen=True)
class Run:
    """A run as it stands: its grid, its arms in order, how it was started (each time), and its rows."""

    path: Path
    grid: Grid
    arms: tuple[Arm, ...]
    sessions: tuple[Session, ...]
    rows: tuple[Row, ...]

    @property
    def makers(self) -> tuple[Session, ...]:
        """The starts that made rows; all starts where there are none."""
        numbers = sorted({row["session"] for row in self.rows})
        return tuple(self.sessions[number] for number in numbers) or self.sessions


def read_run(path: Path) -> Run:
    """A run's folder, which is left as it is; the run may be under way.

    Raises:
        RunError: this is no run's folder, or it is damaged.
    """
    data = _read(path)
    arms = tuple(Arm(str(arm["name"]), Recipe.from_plain(arm["recipe"]), bool(arm["control"])) for arm in data["arms"])
    return Run(path, Grid.build(data["grid"]), arms, tuple(data["sessions"]), tuple(read_rows(path / ROWS, _slim)))


def _slim(row: Row) -> Row:
    found: Row = slim({key: value for key, value in row.items() if key != "recipe"})  # which its arm has, too
    return found


class RunFolder:
    """A run's folder, open for writing; use as a context.

    Attributes:
        rows: the rows so far, and where new ones go.
        session: number of this start among all of this run.
        snapshots: where snapshots go; None if the grid asks for none.
    """

    def __init__(self, lock: FileLock, rows: RowFile, session: int, snapshots: SnapshotFile | None) -> None:
        self._lock = lock
        self.rows = rows
        self.snapshots = snapshots
        self.session = session

    @classmethod
    def open(cls, path: Path, grid: Grid, arms: tuple[Arm, ...], session: Session) -> Self:
        """Begin a run in a new or empty folder, or go on with one of the same grid.

        Raises:
            RunError: the folder holds another grid, another model's rows or something else, another process is
                writing to it, or it cannot be written.
        """
        lock = _locked(path)
        try:
            same, earlier = _identity(grid, arms), check_folder(path, grid, arms)
            _check_weights(path, earlier, session)
            _write(path / GRID, {**same, "sessions": [*earlier, session]})
            snapshots = SnapshotFile.open(path) if grid.snapshots else None
            try:
                return cls(lock, RowFile.open(path / ROWS), len(earlier), snapshots)
            except BaseException:
                if snapshots is not None:
                    snapshots.close()
                raise
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.rows.__exit__(*error)
        if self.snapshots is not None:
            self.snapshots.close()
        self._lock.release()


def _plain(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "control": arm.control, "recipe": arm.recipe.plain()}


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / LOCK, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"another process is writing to {path}, so this one cannot. Wait for it, or give another folder."
        ) from None
    except OSError as error:
        raise RunError(f"{path} cannot be written to: {error.strerror}. Give another folder.") from error
    return lock


def check_folder(path: Path, grid: Grid, arms: tuple[Arm, ...]) -> list[Session]:
    """How this grid was started in that folder before; empty if it would begin there.

    Raises:
        RunError: the folder holds another grid or something else.
    """
    if not (path / GRID).exists():
        strangers = (
            sorted(item.name for item in path.iterdir() if not item.name.startswith(LOCK)) if path.is_dir() else []
        )
        if strangers:
            raise RunError(
                f"{path} holds {', '.join(strangers[:3])} but no {GRID}, so it is not a run's folder. Give a new or "
                "empty one."
            )
        return []
    data = _read(path)
    differs = _differences(tomllib.loads(tomli_w.dumps(_identity(grid, arms))), data)
    if differs:
        raise RunError(
            f"{path} holds the run of another grid ({differs}), and rows of two grids do not mix. Give another folder, "
            "or the settings it was begun with."
        )
    sessions: list[Session] = data["sessions"]
    return sessions


def _identity(grid: Grid, arms: tuple[Arm, ...]) -> dict[str, Any]:
    return {"format": FORMAT, "grid": grid.plain(), "arms": [_plain(arm) for arm in arms]}


def _check_weights(path: Path, earlier: list[Session], session: Session) -> None:
    if earlier and earlier[0]["weights"] != session["weights"]:
        raise RunError(
            f"{path} holds rows of another model: that name stands for other weights now. Give another folder."
        )


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """What differs, in a few words; empty if nothing does."""
    if wanted["format"] != found["format"]:
        return f"format {found['format']} instead of {wanted['format']}"
    new, old = wanted["grid"], {**DEFAULTS, **found["grid"]}
    keys = [key for key in sorted((new.keys() | old.keys()) - set(FREE)) if new.get(key) != old.get(key)]
    said = [f"{key} {old.get(key)!r} instead of {new.get(key)!r}" for key in keys]
    if not said and wanted["arms"] != found["arms"]:
        said = ["a recipe that was changed since"]
    return ", ".join(said)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads((path / GRID).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is not a run's folder: it has no {GRID}. Give one that 'kvthrift eval' made.") from None
    except OSError as error:
        raise RunError(f"{path / GRID} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path / GRID} is damaged ({error}), so its rows mean nothing. Begin in another folder."
        ) from error
    missing = [key for key in ("format", "grid", "arms", "sessions") if key not in data]
    if missing:
        raise RunError(f"{path / GRID} lacks {', '.join(missing)}, so it is not a grid's. Begin in another folder.")
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    """Replace a file as a whole, so that a kill leaves the old one or the new one."""
    try:
        handle, part = tempfile.mkstemp(prefix=LOCK, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            tomli_w.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Make room, or give another folder.") from error
