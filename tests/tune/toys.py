"""A small search on a tiny model, in this process or in a program of its own that can be killed.

python -m tests.tune.toys FOLDER WORKERS
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.eval.toys import SCORERS, Toy, grid, toy_tokenizer
from tests.reading import deep

from kvthrift import Recipe, method
from kvthrift.eval.bench import Bench
from kvthrift.eval.record import Score
from kvthrift.tune.aim import Aim
from kvthrift.tune.plan import plan
from kvthrift.tune.probe import Asked, Probes, prompts_of
from kvthrift.tune.search import Progress, Search
from kvthrift.tune.shards import Shards
from kvthrift.tune.space import Space
from kvthrift.tune.study import Study, Trial

BASE = method("snapkv", budget=48, window=8)
TRIALS = 17
LENGTH = 160


@cache
def toy_bench() -> Bench:
    """A tiny model of four layers."""
    return Bench(deep(4), toy_tokenizer(), page=16)


def ready(number: int) -> tuple[Bench, Mapping[str, Score]]:
    """What a process begins with."""
    return toy_bench(), SCORERS


def prompts(**changes: Any) -> list[Asked]:
    """Three prompts of the toy task."""
    return prompts_of(grid(samples=3, length=LENGTH, **changes), toy_bench(), [Toy()], SCORERS)


def space_of(recipe: Recipe, aim: Aim, vary: tuple[str, ...], engine: str) -> Space:
    """What varies, where layers are searched in pairs."""
    return plan(toy_bench().model, recipe, aim, vary, longest=LENGTH, page=16, group=2, free=engine == "cma")


def tune(
    folder: Path,
    *,
    recipe: Recipe = BASE,
    aim: Aim | None = None,
    vary: tuple[str, ...] = ("layers",),
    engine: str = "cma",
    trials: int = TRIALS,
    workers: int = 1,
    tell: Callable[[Progress], None] = lambda _: None,
    scorers: Mapping[str, Score] = SCORERS,
    asked: list[Asked] | None = None,
) -> tuple[Search, Trial]:
    """A search to its end."""
    aim = aim or Aim("agreement")
    asked = asked or prompts()
    space = space_of(recipe, aim, vary, engine)
    follows = aim.judges == "agreement"
    measures: Probes | Shards
    if workers == 1:
        measures = Probes(toy_bench(), scorers, asked, space.corners, follows=follows)
    else:
        measures = Shards(workers, ready, asked, space.corners, follows=follows)
    try:
        with Study.open(folder, {"recipe": recipe.plain(), "engine": engine}) as study:
            search = Search(space, aim, measures, study, engine, trials, tell=tell)
            return search, search.run()
    finally:
        measures.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    tune(Path(sys.argv[1]), workers=int(sys.argv[2]))
