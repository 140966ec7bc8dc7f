"""EvolKV's search (2509.08315): CMA-ES over one group of layers after another, the others held at the best so far.

Knows a space and a fitness; nothing of models. Options that are no budgets of layers are one more group, the last.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from types import ModuleType
from zlib import crc32

import numpy as np

from kvthrift.errors import MissingPackageError, OptionError
from kvthrift.tune.options import Dim
from kvthrift.tune.space import LAYER, Space, Values

LEAST = 4  # recipes of a generation
GENERATIONS = 3  # a group has at least, where a smaller population makes that possible


@dataclass(frozen=True)
class Schedule:
    """How many recipes are tried: ``generations`` of ``population`` for each of ``groups``, and the start."""

    groups: int
    generations: int
    population: int

    @property
    def trials(self) -> int:
        """Recipes in all."""
        return 1 + self.groups * self.generations * self.population

    @classmethod
    def within(cls, trials: int, sizes: Sequence[int], population: int | None = None) -> Schedule:
        """The schedule that spends up to so many trials.

        Args:
            trials: recipes that may be measured, the start included.
            sizes: dimensions of each group.
            population: recipes of a generation; by default CMA-ES's own ``4 + floor(3 ln d)`` or, where that would
                leave fewer than three generations, less.

        Raises:
            OptionError: the trials are too few for one generation of each group.
        """
        share = (trials - 1) // max(len(sizes), 1)
        own = 4 + int(3 * log(max(sizes)))
        size = population or max(LEAST, min(own, share // GENERATIONS))
        if size < 2 or share < size:
            raise OptionError(
                f"trials={trials} is too few: {len(sizes)} groups with a generation of {size} each, and the start, "
                f"take {1 + len(sizes) * size}. Give that many, or larger groups."
            )
        return cls(len(sizes), share // size, size)


def groups_of(space: Space) -> list[list[Dim]]:
    """The dimensions that are searched together: layers in a row, then everything else."""
    layers = [dim for dim in space.dims if dim.name.startswith(LAYER)]
    rest = [dim for dim in space.dims if not dim.name.startswith(LAYER)]
    size = space.layers.group if space.layers is not None and space.layers.free else max(len(layers), 1)
    out = [layers[at : at + size] for at in range(0, len(layers), size)]
    return [*out, rest] if rest else out


def evolve(
    space: Space, evaluate: Callable[[Values], float], schedule: Schedule, *, sigma: float = 0.3, seed: int = 0
) -> Values:
    """The best place found; the best fitness so far never falls, and a group's turn changes that group alone.

    Args:
        evaluate: the fitness of a place, larger is better, always a number.
        schedule: how many are tried.
        sigma: the first step, where budgets count in multiples of the target and options in their whole range.
        seed: makes the search repeatable.

    Raises:
        MissingPackageError: cma is not installed.
    """
    cma = _cma()
    best, top = space.start, evaluate(space.start)
    for number, dims in enumerate(groups_of(space)):
        draw = np.random.default_rng(crc32(f"{seed}/{number}".encode()))
        strategy = cma.CMAEvolutionStrategy(
            [_scaled(space, dim, best[dim.name]) for dim in dims] + [0.0] * (len(dims) == 1),  # a line is no space
            sigma,
            {
                "seed": 1 + crc32(f"{seed}/{number}".encode()) % 2**31,
                "randn": lambda *shape, draw=draw: draw.standard_normal(shape),
                "popsize": schedule.population,
                "verbose": -9,
            },
        )
        for _ in range(schedule.generations):
            asked = strategy.ask()
            places = [{**best, **_values(space, dims, x)} for x in asked]
            found = [evaluate(place) for place in places]
            strategy.tell(asked, [-value for value in found])
            leader = int(np.argmax(found))
            if found[leader] > top:
                best, top = places[leader], found[leader]
    return best


def _scaled(space: Space, dim: Dim, value: float) -> float:
    if dim.name.startswith(LAYER):
        return value / space.target
    return (value - dim.low) / (dim.high - dim.low)


def _values(space: Space, dims: Sequence[Dim], x: Sequence[float]) -> Values:
    out: Values = {}
    for dim, place in zip(dims, x, strict=False):
        layer = dim.name.startswith(LAYER)
        value = place * space.target if layer else dim.low + place * (dim.high - dim.low)
        value = min(max(float(value), dim.low), dim.high)
        out[dim.name] = round(value) if dim.whole else value
    return out


def _cma() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it cannot plot
            import cma
    except ImportError:
        raise MissingPackageError(
            "the engine 'cma' needs the package cma, which is not installed. Install it: pip install 'kvthrift[tune]'"
        ) from None
    found: ModuleType = cma
    return found
