"""A grid: which methods at which budgets answer which tasks. Read from TOML, changed by flags, written beside its rows.

Knows names and numbers only; what a method or a task is, is looked up elsewhere.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from kvthrift.errors import OptionError, RunError, UnknownNameError
from kvthrift.part import convert, require

Question = Literal["visible", "hidden", "both"]


@dataclass(frozen=True)
class Grid:
    """What is run.

    Attributes:
        tasks: names of tasks or of their groups.
        model: a folder or hub id; empty for the embedded one.
        methods: names; the controls (full, random, streamingllm) are always added.
        recipes: recipe files; one that names its budget keeps it, others are crossed with ``budgets``.
        budgets: entries a head ("512"), shares ("10%") or bytes ("64MiB").
        length: tokens of a sample, template and answer included.
        question: whether the context is compressed before the question is seen, after, or one after the other.
        samples: of each task.
        seed: makes samples repeatable.
        data: folder of local data sets; empty for the one the environment names.
        dtype, device: as for loading a model.
        page: entries a page of the store.
        alone: on so many samples of each task every arm reads the prompt by itself, so that seconds and peak are its
            own; on the others one reading serves all. -1 for all samples.
        snapshots: on so many samples of each task it is kept what each cache held right after compression.
        max_new_tokens: answers are cut there where a task allows more; 0 for the tasks' own limits.
        agreement: whether every arm also follows the full cache's answer, token by token; without it each only answers.
        physics: whether it is looked up which tokens each cache lost, and where its heads look.
        options: options of methods, by method; those of methods that are not run have no effect.
        task_options: set on every task that has an option of that name.
    """

    tasks: tuple[str, ...]
    model: str = ""
    methods: tuple[str, ...] = ("snapkv",)
    recipes: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("512",)
    length: int = 4096
    question: Question = "visible"
    samples: int = 20
    seed: int = 0
    data: str = ""
    dtype: str = "auto"
    device: str = "auto"
    page: int = 64
    alone: int = 1
    snapshots: int = 1
    max_new_tokens: int = 0
    agreement: bool = True
    physics: bool = True
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks is empty, so there is nothing to run. Name at least one.")
        for name in ("length", "samples", "page"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(self.max_new_tokens >= 0, f"max_new_tokens={self.max_new_tokens} must be 0 (the tasks' own) or more.")
        require(self.snapshots >= 0, f"snapshots={self.snapshots} must be 0 (none) or more.")
        require(self.alone >= -1, f"alone={self.alone} must be -1 (all samples) or more.")
        crossed = set(self.methods) - {"full"} or self.recipes
        require(bool(self.budgets) or not crossed, "budgets is empty, so no method knows how much to keep. Name one.")

    @property
    def visibilities(self) -> tuple[bool, ...]:
        """Whether the question is visible, for each way this grid runs."""
        return {"visible": (True,), "hidden": (False,), "both": (False, True)}[self.question]

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """A grid from what a file or a command line gives; texts may list names with commas.

        Raises:
            UnknownNameError: a key that no grid has.
            OptionError: a value of the wrong type or out of range, or no tasks.
        """
        hints = typing.get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UnknownNameError("key of a grid:", key, known)
        if "tasks" not in values:
            raise OptionError(
                "no tasks are named, so there is nothing to run. Give --tasks, or tasks in the config file."
            )
        plain = {key: _value(key, value, hints[key]) for key, value in values.items()}
        return cls(**plain)

    def plain(self) -> dict[str, Any]:
        """As plain data that TOML can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a TOML config file.

    Raises:
        RunError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"config file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"config file {path} is not TOML: {error}.") from error


def _value(key: str, value: Any, hint: Any) -> Any:
    if key == "options":
        return _options(value)
    if key == "task_options":
        return _table(value)
    if isinstance(value, str) and typing.get_origin(hint) is tuple:
        value = [item.strip() for item in value.split(",") if item.strip()]
    found = convert(key, value, hint)
    return tuple(dict.fromkeys(found)) if isinstance(found, tuple) else found


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in value.values()):
        raise OptionError(f"task_options={value!r} must be a table of single values.")
    return {str(name): item for name, item in sorted(value.items())}


def _options(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise OptionError(f"options={value!r} must be one table a method, such as [options.snapkv].")
    return {str(name): dict(table) for name, table in sorted(value.items())}
