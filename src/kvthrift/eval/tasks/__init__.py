"""Where evaluation samples come from: every task by name, in groups. Adding one touches its file and the list below.

A sample's prompt is its context, a turn's question and the start of the answer, joined as they are: pieces bring their
own white space. In a chat template, context and question are the user's message, and the start of the answer follows
the assistant's header. Knows nothing of models, recipes or scores.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any

from kvthrift.errors import UnknownNameError
from kvthrift.eval.sample import Task
from kvthrift.part import convert

_FILES = (
    "babilong",
    "bamboo",
    "code",
    "gsm8k",
    "knowledge",
    "leval",
    "longbench.chinese",
    "longbench.english",
    "longbench.file",
    "longeval",
    "lookup",
    "math500",
    "niah",
    "perplexity",
    "ruler.frequency",
    "ruler.needles",
    "ruler.questions",
    "ruler.variables",
    "scbench",
    "session",
)

__all__ = ["find", "groups", "tasks"]


@cache
def _loaded() -> dict[str, Task]:
    found = [kind() for file in _FILES for kind in import_module(f"{__name__}.{file}").TASKS]
    return {task.name: task for task in found}


def tasks() -> dict[str, Task]:
    """Every task there is, by name, with the options it has by itself."""
    return dict(_loaded())


def groups() -> dict[str, list[str]]:
    """Names of tasks by the name of their group."""
    found: dict[str, list[str]] = {}
    for task in _loaded().values():
        found.setdefault(task.group, []).append(task.name)
    return found


def find(names: Iterable[str], **options: Any) -> list[Task]:
    """The tasks of these names, each once, in the order given.

    Args:
        names: tasks ("ruler.vt"), groups ("ruler") and patterns ("ruler.niah_*").
        options: set on every task that has an option of that name.

    Raises:
        UnknownNameError: no such task or group, or none of the tasks has such an option.
        OptionError: an option's value is out of range.
    """
    chosen = list(dict.fromkeys(name for given in names for name in _resolve(given)))
    known = [{field.name for field in fields(_loaded()[name])} for name in chosen]
    for option in options:
        if not any(option in own for own in known):
            raise UnknownNameError("task option", option, set().union(*known))
    pairs = zip(chosen, known, strict=True)
    return [_with(_loaded()[name], {key: options[key] for key in options if key in own}) for name, own in pairs]


def _resolve(given: str) -> list[str]:
    """Names of the tasks that a name, a group or a pattern means."""
    if given in _loaded():
        return [given]
    if given in groups():
        return groups()[given]
    matched = [name for name in _loaded() if fnmatchcase(name, given)] if "*" in given else []
    if not matched:
        raise UnknownNameError("task", given, [*_loaded(), *groups()])
    return matched


def _with(task: Task, options: dict[str, Any]) -> Task:
    hints = typing.get_type_hints(type(task))
    return replace(task, **{name: convert(name, value, hints[name]) for name, value in options.items()})
