"""The contract every part shares: a frozen record with a name, an option list, and a plain form to save.

A part answers one question of a recipe (which entries matter, how room is shared out, ...). Knows nothing of what
any particular part does.
"""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

from kvthrift.errors import OptionError, RecipeError, UnknownNameError

_REGISTRY: dict[str, dict[str, type[Part]]] = {}

P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class Part:
    """One frozen, comparable, serialisable piece of a recipe.

    A direct subclass names a ``kind`` (scorer, heads, ...); a subclass of that names the part.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind = kind
            _REGISTRY.setdefault(kind, {})
        if name is not None:
            cls.name = name
            _REGISTRY[cls.kind][name] = cls

    @property
    def model(self) -> str:
        """Fingerprint of the model whose config this part was calibrated for; empty if it suits any."""
        return ""

    def plain(self) -> dict[str, Any]:
        """This part as plain data: its name under ``part``, then every option that differs from its default."""
        out: dict[str, Any] = {"part": self.name}
        for f in fields(self):
            value = getattr(self, f.name)
            default = (
                f.default
                if f.default is not MISSING
                else f.default_factory()
                if f.default_factory is not MISSING
                else MISSING
            )
            if value != default:
                out[f.name] = (
                    value.plain() if isinstance(value, Part) else list(value) if isinstance(value, tuple) else value
                )
        return out

    @classmethod
    def from_plain(cls: type[P], data: Any) -> P:
        """Rebuild a part of this kind from :meth:`plain`.

        Raises:
            UnknownNameError: no part of that kind or no option of that name.
            OptionError: an option has the wrong type.
        """
        if not isinstance(data, dict) or not isinstance(data.get("part"), str):
            raise RecipeError(f"a {cls.kind} must be a table with the key 'part', not {data!r}.")
        found = named(cls.kind, data["part"])
        options = {key: value for key, value in data.items() if key != "part"}
        return typing.cast("P", found.build(options))

    @classmethod
    def build(cls, options: dict[str, Any]) -> Self:
        """Make the part from options as a file or a command line gives them, checking names and types."""
        hints = typing.get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in options.items():
            if key not in known:
                raise UnknownNameError(f"option of {cls.kind} {cls.name}:", key, known)
            values[key] = convert(f"{cls.name}.{key}", value, hints[key])
        return cls(**values)

    def __str__(self) -> str:
        options = [f"{key}={_text(value)}" for key, value in self.plain().items() if key != "part"]
        return f"{self.name}({', '.join(options)})" if options else self.name


def _text(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{k}={_text(v)}" for k, v in value.items() if k != "part")
        return f"{value['part']}({inner})" if inner else str(value["part"])
    return str(value)


def named(kind: str, name: str) -> type[Part]:
    """The part class of that kind and name; unknown names are refused with the list of valid ones."""
    if name not in _REGISTRY[kind]:
        raise UnknownNameError(kind, name, _REGISTRY[kind])
    return _REGISTRY[kind][name]


def parts() -> dict[str, dict[str, type[Part]]]:
    """Every registered part: kind -> name -> class."""
    return {kind: dict(found) for kind, found in _REGISTRY.items()}


def convert(label: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against a type hint, reading text where a number is asked for.

    Raises:
        OptionError: the value is not of that type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and str not in args):
            if type(None) in args:
                return None
            raise OptionError(f"option {label} may not be empty.")
        rest = [a for a in args if a is not type(None)]
        for candidate in rest:
            try:
                return convert(label, value, candidate)
            except OptionError:
                continue
        raise OptionError(f"option {label}={value!r} is not one of the types {hint}.")
    if origin is typing.Literal:
        if value not in args:
            raise OptionError(f"option {label}={value!r} is not valid. Valid: {', '.join(map(str, args))}.")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) and value != "()" else () if value == "()" else value
        if not isinstance(items, (list, tuple)):
            raise OptionError(f"option {label}={value!r} is not a list.")
        return tuple(convert(label, item, args[0]) for item in items)
    if isinstance(hint, type) and issubclass(hint, Part):
        return value if isinstance(value, hint) else hint.from_plain(value)
    return _scalar(label, value, hint)


def _scalar(label: str, value: Any, hint: type) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "1", "0"):
            return value.lower() in ("true", "yes", "1")
        raise OptionError(f"option {label}={value!r} is not true or false.")
    if isinstance(value, (bool, list, tuple, dict)):
        raise OptionError(f"option {label}={value!r} is not of type {hint.__name__}.")
    try:
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise OptionError(f"option {label}={value!r} is not of type {hint.__name__}.") from None


def require(condition: bool, message: str) -> None:
    """Refuse an option's value in ``__post_init__``.

    Raises:
        OptionError: ``condition`` is false.
    """
    if not condition:
        raise OptionError(message)
