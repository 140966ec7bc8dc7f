"""The folder of one search: ``study.toml`` says what is searched, ``trials.jsonl`` holds every recipe measured.

A search that is cut short is gone through again from its start, with what was measured looked up instead of measured,
so that it ends as it would have without the cut. Knows nothing of engines.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tomli_w
from filelock import FileLock, Timeout

from kvthrift.errors import RunError
from kvthrift.eval.rows import Row, RowFile, read_rows
from kvthrift.recipe import Recipe
from kvthrift.tune.aim import Measured
from kvthrift.tune.probe import Found, combined

FORMAT = 1
STUDY, TRIALS, BEST, FRONT, LOCK = "study.toml", "trials.jsonl", "best.toml", "front", ".lock"


@dataclass(frozen=True)
class Trial:
    """A recipe that was measured.

    Attributes:
        number: its place in the study's file.
        values: where in the space it lies.
        mean: entries per head and layer, rounded up.
        measured: None if it could not be.
        error: why.
        fitness: larger is better; below all others where there was an error.
    """

    number: int
    values: dict[str, float]
    recipe: Recipe
    mean: int
    measured: Measured | None
    error: str
    fitness: float


def key_of(recipe: Recipe) -> str:
    """What no two trials of a study share."""
    return json.dumps(recipe.plain(), sort_keys=True)


class Study:
    """A search's folder, open for writing; use as a context.

    Attributes:
        found: rows of the trials so far, by the recipe's key.
    """

    def __init__(self, path: Path, lock: FileLock, rows: RowFile) -> None:
        self.path = path
        self._lock, self._rows = lock, rows
        self.found: dict[str, Row] = {key_of(Recipe.from_plain(row["recipe"])): row for row in rows.found}

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Self:
        """Begin a study in a new or empty folder, or go on with the same one.

        Raises:
            RunError: the folder holds another study or something else, another process writes to it, or it cannot be
                written.
        """
        lock = FileLock(path / LOCK, timeout=0)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(f"another process is writing to {path}. Wait for it, or give another folder.") from None
        except OSError as error:
            raise RunError(f"{path} cannot be written to: {error.strerror}. Give another folder.") from error
        try:
            check_study(path, settings)
            if not (path / STUDY).exists():
                write_whole(path / STUDY, tomli_w.dumps({"format": FORMAT, **settings}))
            return cls(path, lock, RowFile.open(path / TRIALS))
        except BaseException:
            lock.release()
            raise

    @property
    def count(self) -> int:
        """Trials there are."""
        return self._rows.count

    def look_up(self, recipe: Recipe) -> tuple[int, Measured | None, str] | None:
        """What was measured of a recipe before: its number, the measurements or the error."""
        row = self.found.get(key_of(recipe))
        return None if row is None else _read_row(row)

    def add(self, recipe: Recipe, values: dict[str, float], found: list[Found] | str, seconds: float) -> None:
        """Keep a trial; it is on the disk when this returns.

        Args:
            found: what it did, prompt by prompt, or why that is not known.
            seconds: measuring took.

        Raises:
            RunError: the disk is full or gone.
        """
        failed = isinstance(found, str)
        row: Row = {
            "number": self.count,
            "values": values,
            "recipe": recipe.plain(),
            "prompts": [] if isinstance(found, str) else sorted(found, key=lambda one: one["number"]),
            "measured": None if isinstance(found, str) else combined(found).plain(),
            "error": found if failed else "",
            "seconds": round(seconds, 3),
        }
        self._rows.append(row)
        self.found[key_of(recipe)] = row

    def save_best(self, recipe: Recipe) -> Path:
        """Write the best recipe so far, whole or not at all; its place."""
        target = self.path / BEST
        write_whole(target, recipe.to_toml())
        return target

    def save_front(self, recipes: list[Recipe]) -> None:
        """Write the recipes of which none is better than another in both values, and remove earlier ones."""
        folder = self.path / FRONT
        folder.mkdir(exist_ok=True)
        for number, recipe in enumerate(recipes):
            write_whole(folder / f"{number:02d}.toml", recipe.to_toml())
        for stale in folder.glob("*.toml"):
            if not stale.stem.isdigit() or int(stale.stem) >= len(recipes):
                stale.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.__exit__(*error)
        self._lock.release()


def check_study(path: Path, settings: dict[str, Any]) -> int:
    """Refuse a folder that these settings cannot go on in; how many trials it holds.

    Raises:
        RunError: it holds another study or something else, or is damaged.
    """
    if not (path / STUDY).exists():
        strangers = sorted(x.name for x in path.iterdir() if not x.name.startswith(".")) if path.is_dir() else []
        if strangers:
            raise RunError(f"{path} holds {', '.join(strangers[:3])} but no {STUDY}. Give a new or empty folder.")
        return 0
    try:
        there = tomllib.loads((path / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / STUDY} cannot be read ({error}). Begin in another folder.") from error
    wanted = tomllib.loads(tomli_w.dumps({"format": FORMAT, **settings}))
    keys = [key for key in sorted(wanted.keys() | there.keys()) if wanted.get(key) != there.get(key)]
    if keys:
        raise RunError(
            f"{path} holds another study (it differs in {', '.join(keys)}), and trials of two do not mix. Give another "
            "folder, or the settings it was begun with."
        )
    return len(read_rows(path / TRIALS))


def write_whole(path: Path, text: str) -> None:
    """Replace a file as a whole.

    Raises:
        RunError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Make room, or give another folder.") from error


def _read_row(row: Row) -> tuple[int, Measured | None, str]:
    measured = row["measured"]
    if measured is None:
        return row["number"], None, row["error"]
    return row["number"], Measured(**{k: math.nan if v is None else v for k, v in measured.items()}), ""
