"""A whole search: the recipe as it stands, what an engine asks for, and the best of it as a recipe file.

Knows which engine does what; nothing of models or of how prompts are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from kvthrift.errors import KvthriftError, RunError
from kvthrift.recipe import Recipe
from kvthrift.tune.aim import WORST, Aim, Measured
from kvthrift.tune.evolve import Schedule, evolve, groups_of
from kvthrift.tune.probe import Found, combined
from kvthrift.tune.sample import Worth, sample
from kvthrift.tune.space import Space, Values
from kvthrift.tune.study import Study, Trial

ENGINES = ("cma", "optuna")
SUFFIX = "-tuned"  # so that an evaluation can have it beside what it was tuned from


class Measures(Protocol):
    """Who measures recipes on a study's prompts."""

    def full(self) -> list[Found]:
        """What the full cache does, prompt by prompt."""

    def measure(self, recipe: Recipe) -> list[Found]:
        """What a recipe does, prompt by prompt."""


@dataclass
class Progress:
    """How far a search is: recipes asked for, how many there will be, the best so far, and the newest."""

    done: int
    total: int
    best: Trial | None
    newest: Trial


@dataclass
class Search:
    """One search.

    Attributes:
        space: what may vary.
        aim: what is better.
        measures: who measures.
        study: where trials are kept.
        engine: "cma" or "optuna".
        trials: recipes that may be measured.
        sigma, population: of the engine "cma"; see :mod:`kvthrift.tune.evolve`.
        seed: makes it repeatable.
        tell: called after every trial.
    """

    space: Space
    aim: Aim
    measures: Measures
    study: Study
    engine: str = "cma"
    trials: int = 40
    sigma: float = 0.3
    population: int | None = None
    seed: int = 0
    tell: Callable[[Progress], None] = field(default=lambda _: None)
    full: Measured | None = None
    seen: dict[int, Trial] = field(default_factory=dict)
    _asked: int = 0
    _total: int = 0
    _saved: int | None = None

    def run(self) -> Trial:
        """Search to the end; the best trial, whose recipe is in the study's ``best.toml`` then.

        Raises:
            RunError: the recipe as it stands cannot be measured, nothing keeps the floor, or a process or the disk is
                lost.
            OptionError: too few trials for the engine.
            MissingPackageError: the engine is not installed.
        """
        schedule = None
        if self.engine == "cma":
            sizes = [len(dims) for dims in groups_of(self.space)]
            schedule = Schedule.within(self.trials, sizes, self.population)
        self._total = self.trials if schedule is None else schedule.trials + 1
        self.full = combined(self.measures.full())
        self._check_full(self.full)
        if schedule is None:
            sample(self.space, self._worth, trials=self.trials, values=2 if self.aim.trades else 1, seed=self.seed)
        else:
            found = evolve(self.space, self._fitness, schedule, sigma=self.sigma, seed=self.seed)
            if not self.aim.shrinks:
                self._try(found, self.space.completed(found))
        return self._end()

    def _check_full(self, full: Measured) -> None:
        if math.isnan(self.aim.quality_of(full)):
            raise RunError(
                f"the full cache's {self.aim.judges} is not a number (NaN) on these prompts, so there is nothing to "
                "search by. Take other tasks, longer answers, or another objective."
            )
        if self.aim.judges == "score" and self.aim.shrinks and full.score <= 0:
            raise RunError("the full cache scores 0 on these prompts, so every cache keeps that. Take other tasks.")

    # -- trials --------------------------------------------------------------------------------------------------

    def _fitness(self, values: Values) -> float:
        return self._try(values).fitness

    def _worth(self, values: Values) -> Worth | None:
        trial = self._try(values)
        if not self.aim.trades:
            return (trial.fitness,)
        if trial.measured is None:
            return None
        quality, size = self.aim.values(trial.measured)
        return quality, -size

    def _try(self, values: Values, recipe: Recipe | None = None) -> Trial:
        """A place's trial, looked up or measured now."""
        try:
            wanted = self.space.recipe(values) if recipe is None else recipe
        except KvthriftError as error:  # options that do not go together: no recipe, so nothing to keep
            trial = Trial(-1, values, self.space.base, self.space.target, None, str(error), WORST)
        else:
            trial = self._known(values, wanted)
        if not self.seen and trial.error:
            raise RunError(f"the recipe as it stands cannot be searched from: {trial.error}")
        self._asked += 1
        if trial.number >= 0:
            self.seen[trial.number] = trial
            self._save()
        self.tell(Progress(self._asked, self._total, self.best, trial))
        return trial

    def _known(self, values: Values, recipe: Recipe) -> Trial:
        row = self.study.look_up(recipe)
        if row is None:
            began = perf_counter()
            found: list[Found] | str
            try:
                found = self.measures.measure(recipe)
            except RunError:
                raise
            except KvthriftError as refused:
                found = str(refused)
            self.study.add(recipe, values, found, perf_counter() - began)
            row = self.study.look_up(recipe)
            assert row is not None
        number, measured, error = row
        mean = self.space.mean(values)
        if recipe.budget == self.space.base.budget:
            mean = self.space.target
        fitness = WORST
        if measured is not None:
            fitness = self.aim.fitness(measured, mean, self.space.target, self.full.score if self.full else math.nan)
            if math.isnan(fitness):
                fitness, error = WORST, f"the {self.aim.judges} is not a number (NaN) on these prompts"
        return Trial(number, values, recipe, mean, None if error else measured, error, fitness)

    # -- the best ------------------------------------------------------------------------------------------------

    @property
    def best(self) -> Trial | None:
        """The best trial so far that keeps to the budget, or to the floor; None if there is none."""
        fit = [trial for trial in self.seen.values() if trial.measured is not None and self._keeps(trial)]
        return max(fit, key=self._rank, default=None)

    def _keeps(self, trial: Trial) -> bool:
        """Whether it may be the result."""
        assert trial.measured is not None
        if self.aim.shrinks:
            return self.aim.fitness(trial.measured, 1, 1, self.full.score if self.full else math.nan) > 0
        budget, start = self.space.base.budget, self.seen[min(self.seen)].measured
        room = math.inf
        if budget is not None and budget.unit == "bytes" and start is not None:
            room = max(float(budget.amount), start.most_bytes)
        return trial.mean <= self.space.target and trial.measured.most_bytes <= room

    def _rank(self, trial: Trial) -> tuple[float, ...]:
        assert trial.measured is not None
        if self.aim.shrinks:
            return (-trial.measured.bytes, -trial.measured.entries, self.aim.quality_of(trial.measured), -trial.number)
        return (trial.fitness, -trial.measured.bytes, -trial.measured.entries, -trial.number)

    def front(self) -> list[Trial]:
        """Trials of which none is better than another in both values, smallest first."""
        known = [(trial, trial.measured) for trial in self.seen.values() if trial.measured is not None]
        out: list[Trial] = []
        top = -math.inf
        for trial, found in sorted(
            known, key=lambda pair: (pair[1].bytes, -self.aim.quality_of(pair[1]), pair[0].number)
        ):
            if self.aim.quality_of(found) > top:
                top = self.aim.quality_of(found)
                out.append(trial)
        return out

    def _save(self) -> None:
        best = self.best
        if best is not None and best.number != self._saved:
            self.study.save_best(self.result(best))
            self._saved = best.number

    def result(self, trial: Trial) -> Recipe:
        """A trial's recipe under a name of its own, with the budget that was asked for where it holds just that."""
        base = self.space.base
        own = not self.aim.shrinks and trial.mean == self.space.target
        name = base.name if base.name.endswith(SUFFIX) else base.name + SUFFIX
        return trial.recipe.with_options(name=name, budget=base.budget if own else trial.recipe.budget)

    def _end(self) -> Trial:
        if self.aim.trades:
            front = self.front()
            self.study.save_front([self.result(trial) for trial in front])
            chosen = self.best or front[-1]
            self.study.save_best(self.result(chosen))
            return chosen
        best = self.best
        if best is None:
            tried: Sequence[Any] = [t.measured for t in self.seen.values() if t.measured is not None]
            top = max((self.aim.quality_of(found) for found in tried), default=0.0)
            raise RunError(
                f"no recipe of {len(self.seen)} keeps {self.aim.floor:.0%} of the full cache's {self.aim.judges} "
                f"within the budget {self.space.base.budget}; the best kept {top:.1%}. Raise the budget or "
                "lower the floor."
            )
        return best
