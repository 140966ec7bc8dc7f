"""The numbers that a recipe's parts take as options, by their path, and how far each may vary.

Knows parts by the options they declare, and none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvthrift.errors import KvthriftError, OptionError, UnknownNameError
from kvthrift.part import Part, require
from kvthrift.recipe import Protect, Recipe

SLOTS = ("scorer", "layers", "heads", "unit", "refine", "merge", "protect")
NO_OPTIONS = ("seed", "model", "ranked")  # numbers whose size means nothing to what is kept
SPREAD = 4  # an option is tried from a fourth of what it is to four times that


@dataclass(frozen=True)
class Dim:
    """One number that may vary, from ``low`` to ``high``, both included."""

    name: str
    low: float
    high: float
    start: float
    whole: bool
    log: bool = False


def numeric_options(recipe: Recipe) -> dict[str, float]:
    """Every number that the recipe's parts take as an option, by its path ("scorer.window"), as it is now."""
    return {path: value for slot in SLOTS for path, value in _numbers(getattr(recipe, slot), slot)}


def _numbers(part: Any, path: str) -> Iterator[tuple[str, float]]:
    if not isinstance(part, (Part, Protect)):
        return
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Part):
            yield from _numbers(value, f"{path}.{f.name}")
        elif type(value) in (int, float) and f.name not in NO_OPTIONS:
            yield f"{path}.{f.name}", value


def with_option(recipe: Recipe, path: str, value: float) -> Recipe:
    """The recipe with the option at a path replaced.

    Raises:
        KvthriftError: the value is out of range, or does not go with the other options.
    """
    slot, *rest = path.split(".")
    return recipe.with_options(**{slot: _replaced(getattr(recipe, slot), rest, value)})


def _replaced(part: Any, path: Sequence[str], value: float) -> Any:
    name, *rest = path
    return replace(part, **{name: _replaced(getattr(part, name), rest, value) if rest else value})


def snapped(recipe: Recipe, dim: Dim, value: float) -> Recipe:
    """With the value, or for a whole number its next neighbour, where only that is allowed (odd kernels)."""
    if not dim.whole:
        return with_option(recipe, dim.name, float(value))
    whole = round(value)
    first: KvthriftError | None = None
    for near in (whole, whole + 1, whole - 1):
        if dim.low <= near <= dim.high:
            try:
                return with_option(recipe, dim.name, near)
            except KvthriftError as error:
                first = first or error
    raise first or OptionError(f"{dim.name}={value} lies outside {dim.low} to {dim.high}.")


def option_dim(recipe: Recipe, path: str, low: float | None = None, high: float | None = None) -> Dim:
    """The dimension of an option; its range is around what it is now, as far as values are valid, where none is given.

    Raises:
        UnknownNameError: the recipe has no such option, or it is no number.
        OptionError: the range is empty, or the option's own value lies outside.
    """
    known = numeric_options(recipe)
    if path not in known:
        raise UnknownNameError("numeric option", path, known)
    now = known[path]
    whole = type(now) is int
    if low is None or high is None:
        low, high = _around(now, whole=whole)
        low, high = (_valid_end(recipe, path, now, end, whole=whole) for end in (low, high))
    if not low < high:
        raise OptionError(f"{path} has no room to vary from {low:g} to {high:g}. Give a range: {path}=LOW:HIGH.")
    require(low <= now <= high, f"{path}={now:g} lies outside the range {low:g} to {high:g} that is to be searched.")
    return Dim(path, low, high, now, whole)


def _around(now: float, *, whole: bool) -> tuple[float, float]:
    if whole:
        return (int(now) // SPREAD if now > 1 else int(now), max(int(now) * SPREAD, 8))
    ends = (now / SPREAD, now * SPREAD) if now else (0.0, 1.0)
    return min(ends), max(ends)


def _valid_end(recipe: Recipe, path: str, now: float, end: float, *, whole: bool) -> float:
    """The value furthest towards ``end`` that the part takes."""

    def valid(value: float) -> bool:
        dim = Dim(path, min(now, end), max(now, end), now, whole)
        return _builds(lambda: snapped(recipe, dim, value))

    good, bad = now, end
    if valid(end):
        return end
    for _ in range(30):
        middle = (good + bad) // 2 if whole else (good + bad) / 2
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if valid(middle) else (good, middle)
    return good


def _builds(make: Callable[[], Recipe]) -> bool:
    try:
        make()
    except KvthriftError:
        return False
    return True
