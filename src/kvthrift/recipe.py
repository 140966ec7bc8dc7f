"""A recipe: a frozen composition of parts. A published method's name and its options make one.

Knows the kinds of parts there are, and nothing of what any part does or which papers exist.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import tomli_w

from kvthrift.allocate import HeadAllocator, LayerAllocator, UniformHeads, UniformLayers
from kvthrift.budget import Budget
from kvthrift.codec import Codec
from kvthrift.core import Signals
from kvthrift.errors import OptionError, RecipeError, UnknownNameError
from kvthrift.merge import Evict, Merger
from kvthrift.part import Part, convert, require
from kvthrift.score import Scorer
from kvthrift.select import Refiner, TokenUnit, Unit

FORMAT = 1


@dataclass(frozen=True)
class Protect:
    """Entries that may never go: the first ``sinks`` tokens and the ``recent`` newest entries of every head."""

    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        require(self.sinks >= 0, f"protected sinks={self.sinks} must be 0 or more tokens.")
        require(self.recent >= 0, f"protected recent={self.recent} must be 0 or more entries.")

    @property
    def entries(self) -> int:
        """Entries per head that are always kept."""
        return self.sinks + self.recent


@dataclass(frozen=True)
class Trigger:
    """When a recipe acts.

    ``prompt``: after a forward pass over several tokens, if it is the first or has at least ``min_turn`` of them
    (shorter ones are taken for speculation). ``every``: also after that many decoded tokens; None for never. These are
    each sequence's own, or with ``together`` those of all sequences of a cache added up.
    """

    prompt: bool = True
    every: int | None = None
    min_turn: int = 32
    together: bool = False

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, f"every={self.every} must be at least 1 token.")
        require(self.min_turn >= 2, f"min_turn={self.min_turn} must be at least 2 tokens.")
        require(
            self.every is not None or not self.together, "together=True counts decoded tokens, but every is not set."
        )

    def steps(self, batch: int) -> int | None:
        """Tokens of each of ``batch`` sequences after which decoding is due; None for never."""
        return -(-self.every // max(batch, 1)) if self.every is not None and self.together else self.every


@dataclass(frozen=True)
class Recipe:
    """What to keep, how much, where and when.

    Attributes:
        name: the method it came from, or one of your own.
        scorer: which entries matter.
        budget: how much is kept in all; None keeps everything, or what ``layers`` finds to be enough.
        layers, heads: how the room is shared out over layers, and over the heads of a layer.
        unit: what is kept or dropped together.
        refine: a second look at the ranking once budgets are known.
        merge: what becomes of the entries that go.
        protect, trigger: what may never go, and when this happens.
        skip: layers that are left whole (negative counts from the top).
        reuse: this many layers in a row share the first one's choice.
        rerotate: close the gaps in positions by re-rotating kept keys.
        codec: how the numbers of what stays are written, but for each head's newest page; None for as they are.
    """

    name: str
    scorer: Scorer
    budget: Budget | None = None
    layers: LayerAllocator = field(default_factory=UniformLayers)
    heads: HeadAllocator = field(default_factory=UniformHeads)
    unit: Unit = field(default_factory=TokenUnit)
    refine: Refiner | None = None
    merge: Merger = field(default_factory=Evict)
    protect: Protect = field(default_factory=Protect)
    trigger: Trigger = field(default_factory=Trigger)
    skip: tuple[int, ...] = ()
    reuse: int = 1
    rerotate: bool = False
    codec: Codec | None = None

    def __post_init__(self) -> None:
        require(self.reuse >= 1, f"reuse={self.reuse} must be at least 1 layer.")
        if self.reuse > 1 and (self.layers.scope != "layer" or self.layers.decides):
            raise RecipeError(
                f"recipe {self.name}: reuse={self.reuse} copies one layer's choice to the next, but {self.layers.name} "
                "gives each layer its own budget. Use one of the two."
            )
        if self.unit.shared and not self.heads.uniform:
            raise RecipeError(
                f"recipe {self.name}: unit {self.unit.name} keeps the same groups in all heads, but heads="
                f"{self.heads.name} gives them different budgets. Set per_head on the unit, or uniform heads."
            )
        if self.heads.modelwide and not isinstance(self.layers, UniformLayers):
            raise RecipeError(
                f"recipe {self.name}: heads={self.heads.name} shares room out over all layers, but layers="
                f"{self.layers.name} gives each layer its own budget, which that would undo. Use one of the two."
            )
        if self.layers.gives_heads and not (self.heads.uniform and not self.unit.shared):
            raise RecipeError(
                f"recipe {self.name}: layers={self.layers.name} gives every head its own budget, which heads="
                f"{self.heads.name} or a unit that all heads share would undo. Use one of the two."
            )
        self.merge.check(self.scorer)

    @property
    def compresses(self) -> bool:
        """Whether anything may go: there is a budget, or the layers find their own."""
        return self.budget is not None or self.layers.decides

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part it is made of."""
        found = (self.scorer, self.layers, self.heads, self.unit, self.refine, self.merge, self.codec)
        return tuple(part for part in found if part is not None)

    @property
    def needs(self) -> Signals:
        """Every signal that any part declares."""
        out = Signals(rope=self.rerotate)
        for part in (self.scorer, self.layers, self.heads, self.unit, self.refine):
            if part is not None:
                out = out | part.needs
        return out

    def with_options(self, **changes: Any) -> Self:
        """The same recipe with some fields replaced."""
        return replace(self, **changes)

    # -- plain form ----------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        """This recipe as plain data; fields at their defaults are left out."""
        out: dict[str, Any] = {"format": FORMAT, "name": self.name}
        blank = Recipe(self.name, self.scorer)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "name" or (value == getattr(blank, f.name) and f.name != "scorer"):
                continue
            out[f.name] = _plain(value)
        return out

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """Rebuild a recipe from :meth:`plain`.

        Raises:
            RecipeError: unknown fields, parts or options, or values of the wrong type.
        """
        if not isinstance(data, dict) or "name" not in data or "scorer" not in data:
            raise RecipeError(
                "a recipe needs at least the keys 'name' and 'scorer'; this file has neither or is empty."
            )
        if data.get("format", FORMAT) != FORMAT:
            raise RecipeError(f"recipe format {data['format']} is not {FORMAT}: it was written by another version.")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {"name": str(data["name"])}
        for key, value in data.items():
            if key in ("format", "name"):
                continue
            if key not in known:
                raise UnknownNameError("recipe field", key, known)
            values[key] = _FIELDS[key](value)
        return cls(**values)

    def to_json(self) -> str:
        """The plain form as JSON."""
        return json.dumps(self.plain(), indent=2)

    def to_toml(self) -> str:
        """The plain form as TOML."""
        return tomli_w.dumps(self.plain())

    def save(self, path: str | Path) -> None:
        """Write a ``.toml`` or ``.json`` file."""
        target = Path(path)
        whole = self.to_json() if target.suffix == ".json" else self.to_toml()
        part = target.with_name(f".{target.name}.part")
        part.write_text(whole, encoding="utf-8")  # moved into place whole, so that a killed run leaves no half recipe
        part.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            RecipeError: the file is missing, cannot be read, or is not a recipe.
        """
        source = Path(path)
        try:
            text = source.read_text(encoding="utf-8")
            data = json.loads(text) if source.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise RecipeError(f"recipe file {source} cannot be read: {error.strerror}.") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {source} is neither TOML nor JSON: {error}.") from error
        return cls.from_plain(data)

    def __str__(self) -> str:
        """One readable line."""
        plain = self.plain()
        skipped = ("format", "name", "budget", "scorer")
        rest = [f"{key}={_line(getattr(self, key))}" for key in plain if key not in skipped]
        budget = f"budget={self.budget or self._unbounded}"
        return f"{self.name}: {self.scorer} | {', '.join([budget, *rest])}"

    @property
    def _unbounded(self) -> str:
        return "as much as is needed" if self.layers.decides else "everything"

    def table(self) -> list[tuple[str, str]]:
        """Rows of (question, answer), one a part, for people to read."""
        rows = [("keeps", str(self.budget or self._unbounded))]
        for f in fields(self):
            if f.name not in ("name", "budget"):
                rows.append((f.name, _line(getattr(self, f.name))))
        return [*rows, ("needs", str(self.needs))]


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.plain()
    if isinstance(value, (Protect, Trigger)):
        return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Budget) else value


def _line(value: Any) -> str:
    if isinstance(value, (Protect, Trigger)):
        shown = ", ".join(f"{f.name}={getattr(value, f.name)}" for f in fields(value))
        return f"({shown})"
    return "none" if value is None or value == () else str(value)


def _record(kind: type[Protect] | type[Trigger]) -> Any:
    hints = {f.name: f for f in fields(kind)}
    types = {"sinks": int, "recent": int, "prompt": bool, "every": int | None, "min_turn": int, "together": bool}

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            raise OptionError(f"{kind.__name__.lower()} must be a table, not {value!r}.")
        for key in value:
            if key not in hints:
                raise UnknownNameError(f"option of {kind.__name__.lower()}:", key, hints)
        return kind(**{key: convert(key, item, types[key]) for key, item in value.items()})

    return build


_FIELDS: dict[str, Any] = {
    "scorer": Scorer.from_plain,
    "budget": Budget.parse,
    "layers": LayerAllocator.from_plain,
    "heads": HeadAllocator.from_plain,
    "unit": Unit.from_plain,
    "refine": Refiner.from_plain,
    "merge": Merger.from_plain,
    "protect": _record(Protect),
    "trigger": _record(Trigger),
    "skip": lambda value: convert("skip", value, tuple[int, ...]),
    "reuse": lambda value: convert("reuse", value, int),
    "rerotate": lambda value: convert("rerotate", value, bool),
    "codec": Codec.from_plain,
}
