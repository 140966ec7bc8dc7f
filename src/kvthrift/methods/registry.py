"""How a method's name and options become a recipe, and what ``kvthrift methods`` prints.

A method file decorates one function with :func:`published`; its arguments are the method's options, its docstring the
help. Knows no paper.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from kvthrift.budget import Budget
from kvthrift.codec import Codec
from kvthrift.errors import RecipeError, UnknownNameError
from kvthrift.merge import Merger
from kvthrift.part import convert, named
from kvthrift.recipe import Recipe

Builder = Callable[..., Recipe]
_COMMON = ("budget", "every", "merge", "skip", "codec")


@dataclass(frozen=True)
class Option:
    """One option of a method: name, default, type as text, and one sentence."""

    name: str
    default: Any
    type: str
    help: str


@dataclass(frozen=True)
class Method:
    """A published system.

    Attributes:
        name: how it is called here.
        title: how its paper calls it.
        paper: arXiv id, or empty.
        build: options -> recipe.
    """

    name: str
    title: str
    paper: str
    build: Builder

    @property
    def summary(self) -> str:
        """First paragraph of the docstring, in one line."""
        return " ".join((inspect.getdoc(self.build) or "").split("\n\n")[0].split())

    @property
    def text(self) -> str:
        """The docstring without its list of options."""
        return (inspect.getdoc(self.build) or "").split("\nArgs:")[0].strip()

    @property
    def options(self) -> list[Option]:
        """The method's own options; every method also takes budget, every, merge, skip and codec."""
        helps = _argument_help(inspect.getdoc(self.build) or "")
        hints = typing.get_type_hints(self.build)
        return [
            Option(p.name, p.default, _type_name(hints[p.name]), helps.get(p.name, ""))
            for p in inspect.signature(self.build).parameters.values()
        ]


_METHODS: dict[str, Method] = {}


def published(name: str, *, title: str, paper: str = "") -> Callable[[Builder], Builder]:
    """Register a function from options to a recipe as a method."""

    def register(build: Builder) -> Builder:
        _METHODS[name] = Method(name, title, paper, build)
        return build

    return register


@cache
def _load() -> None:
    package = import_module("kvthrift.methods")
    for file in package._FILES:
        import_module(f"kvthrift.methods.{file}")


def methods() -> dict[str, Method]:
    """Every method there is, by name."""
    _load()
    return dict(sorted(_METHODS.items()))


def method(
    name: str,
    /,
    *,
    budget: int | str | Budget | None = None,
    every: int | str | None = None,
    merge: str | Merger | None = None,
    skip: tuple[int, ...] | str | None = None,
    codec: str | Codec | None = None,
    **options: Any,
) -> Recipe:
    """The recipe of a published method.

    Args:
        name: one of :func:`methods`.
        budget: entries per KV head (512), a share of the prompt ("25%") or bytes in all ("64MiB").
        every: compress again after that many decoded tokens; None for prompts only.
        merge: what becomes of the entries that go ("evict", "fold").
        skip: numbers of layers to leave whole (negative counts from the top).
        codec: how what stays is written ("int8", "int4", "int2", "fp8"); None for as it is.
        options: the method's own options.

    Raises:
        UnknownNameError: no such method or option.
        RecipeError: a value is out of range, or the combination cannot be honoured.
        BudgetError: the budget cannot be read.
    """
    known = methods()
    if name not in known:
        raise UnknownNameError("method", name, known)
    build = known[name].build
    hints = typing.get_type_hints(build)
    hints.pop("return", None)
    values = {}
    for key, value in options.items():
        if key not in hints:
            raise UnknownNameError(f"option of method {name}:", key, [*hints, *_COMMON])
        values[key] = convert(key, value, hints[key])
    recipe = build(**values)
    changes: dict[str, Any] = {"name": name}
    if budget is not None:
        if name == "full":
            raise RecipeError("method 'full' keeps everything and takes no budget. Leave the budget out.")
        changes["budget"] = Budget.parse(budget)
    if every is not None:
        step = convert("every", every, int | None)
        changes["trigger"] = type(recipe.trigger)(recipe.trigger.prompt, step, recipe.trigger.min_turn)
    if merge is not None:
        changes["merge"] = merge if isinstance(merge, Merger) else named("merge", merge)()
    if skip is not None:
        changes["skip"] = convert("skip", skip, tuple[int, ...])
    if codec is not None and codec != "none":
        changes["codec"] = codec if isinstance(codec, Codec) else named("codec", codec)()
    return recipe.with_options(**changes)


def base_recipe(name: str, wrapper: str) -> Recipe:
    """The recipe a wrapping method builds on; one that wraps another itself is fine, itself is not."""
    if name == wrapper:
        raise RecipeError(f"method {wrapper} cannot wrap itself. Give another base.")
    return method(name)


def _argument_help(doc: str) -> dict[str, str]:
    helps: dict[str, str] = {}
    current = ""
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        if not line.strip():
            break
        if line.startswith("    ") and not line.startswith("     "):
            current, _, text = line.strip().partition(": ")
            helps[current] = text
        elif current:
            helps[current] += " " + line.strip()
    return helps


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
