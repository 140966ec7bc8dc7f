"""Recipes measured on fixed prompts: each prompt is read once, and every recipe compresses a fork of that reading.

The pipeline of an evaluation (:mod:`kvthrift.eval.measure`), for recipes that come one after another. Knows nothing of
search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from kvthrift.errors import DataError, KvthriftError, MissingSignalError, UnknownNameError
from kvthrift.eval.arm import FULL, Arm, redrawn
from kvthrift.eval.bench import Bench, PlainTokenizer
from kvthrift.eval.config import Grid
from kvthrift.eval.decode import read
from kvthrift.eval.measure import Part, Reference, Work
from kvthrift.eval.prompt import Prompt, build_prompt, tokenize
from kvthrift.eval.record import LIKELIHOOD, Score, blank_row, measured_row
from kvthrift.eval.round import Failure, attempt
from kvthrift.eval.sample import Sample, Task, shortened
from kvthrift.methods import method
from kvthrift.recipe import Recipe
from kvthrift.tune.aim import Measured

ARM = "tuned"
Found = dict[str, float]
"""What a recipe did on one prompt: score, tokens that agreed and that were compared, bytes and entries held."""


@dataclass(frozen=True)
class Asked:
    """One prompt of a study: its number, the sample it is made of, and whether its question is visible."""

    number: int
    sample: Sample
    visible: bool


def prompts_of(grid: Grid, bench: Bench, tasks: Sequence[Task], scorers: Mapping[str, Score]) -> list[Asked]:
    """The prompts that a grid's tasks make.

    Raises:
        DataError: a task has no samples, or its data is not there.
        ContextError: the length is too short for a task.
        UnknownNameError: nobody can score a task.
    """
    out: list[Asked] = []
    data = Path(grid.data) if grid.data else None
    tokenizer = PlainTokenizer(bench.tokenizer)
    for task in tasks:
        before = len(out)
        for sample in task.samples(tokenizer, length=grid.length, count=grid.samples, seed=grid.seed, data=data):
            if sample.scorer != LIKELIHOOD and sample.scorer not in scorers:
                raise UnknownNameError(f"scorer of task {task.name}:", sample.scorer, scorers)
            short = shortened(sample, grid.max_new_tokens) if grid.max_new_tokens else sample
            out += [Asked(len(out) + n, short, visible) for n, visible in enumerate(grid.visibilities)]
        if len(out) == before:
            raise DataError(f"task {task.name} has no samples of {grid.length} tokens. Check its data folder.")
    return out


class Probe:
    """One prompt, read.

    Args:
        corners: recipes that say what has to be looked at while reading.
        follows: whether recipes follow the full cache's answer, so that agreement is known; else they answer freely,
            so that the score is.

    Raises:
        KvthriftError: the prompt cannot be made, or the full cache cannot answer it.
    """

    def __init__(
        self, bench: Bench, asked: Asked, score: Score | None, corners: Sequence[Recipe], *, follows: bool
    ) -> None:
        self.bench, self.asked, self.score, self.follows = bench, asked, score, follows
        self.prompt: Prompt = build_prompt(bench.tokenizer, asked.sample, visible=asked.visible)
        bench.check_length(self.prompt.longest, f"sample {asked.sample.id} of {asked.sample.task} with its answer")
        self.works: list[tuple[Work, Reference]] = []
        arm = Arm(FULL, method(FULL))
        parts: list[Part] = []
        for reading in self.prompt.readings:
            make = partial(
                read, bench.model, reading.ids, arm.recipe, page=bench.page, observe=corners, tokenizer=bench.tokenizer
            )
            shared = attempt(make)
            limits = [turn.max_new_tokens for turn in asked.sample.turns]
            held = None if isinstance(shared, Failure) else shared
            work = Work(bench, self.prompt, reading, limits, self._given(), held)
            part, said = work.full(arm)
            if follows and not work.given:
                work = replace(work, given={turn: one.answer.tokens for turn, one in said.items()})
            self.works.append((work, said))
            parts.append(part)
        self.full = self._found(arm, parts)

    def _given(self) -> dict[int, tuple[int, ...]]:
        sample = self.asked.sample
        if sample.scorer != LIKELIHOOD:
            return {}
        return {n: tokenize(self.bench.tokenizer, turn.answers[0]) for n, turn in enumerate(sample.turns)}

    def measure(self, recipe: Recipe) -> Found:
        """What a recipe does.

        Raises:
            KvthriftError: it cannot be honoured.
        """
        arm = redrawn(Arm(ARM, recipe), f"{self.asked.sample.task}/{self.asked.sample.id}")
        return self._found(arm, [self._part(work, arm, said) for work, said in self.works])

    def _part(self, work: Work, arm: Arm, said: Reference) -> Part:
        try:
            return work.compressed(arm, said)
        except MissingSignalError:
            if work.shared is None:
                raise
            return replace(work, shared=None).compressed(arm, said)  # looks at what no corner does: it reads by itself

    def _found(self, arm: Arm, parts: Sequence[Part]) -> Found:
        sample, visible = self.asked.sample, self.asked.visible
        blank = blank_row(sample, arm, visible=visible, session=0)
        row = measured_row(blank, sample, self.prompt, parts, self.bench.decode, self.score)
        agreed, steps = self._agreed(parts)
        free = not self.follows or arm.name == FULL or sample.scorer == LIKELIHOOD
        return {
            "number": self.asked.number,
            "score": row["score"] if free else math.nan,
            "agreed": agreed,
            "steps": steps,
            **{key: row[key] for key in ("bytes", "full_bytes", "entries", "full_entries")},
        }

    def _agreed(self, parts: Sequence[Part]) -> tuple[float, int]:
        """Tokens that agree, of those said behind a compression, and how many those are."""
        before = {ask.turn for reading in self.prompt.readings for ask in reading.asks if not ask.ids}
        agreed, steps = 0.0, 0
        for part in parts:
            for turn, found in part.agreement.items():
                wrong, count = found.later if turn in before else (len(found.mismatches), found.steps)
                agreed, steps = agreed + count - wrong, steps + count
                if not all(map(math.isfinite, found.kl)):
                    agreed = math.nan
        return agreed, steps


class Probes:
    """Several prompts, read; measures recipes here, one after another."""

    def __init__(
        self,
        bench: Bench,
        scorers: Mapping[str, Score],
        asked: Sequence[Asked],
        corners: Sequence[Recipe],
        *,
        follows: bool,
    ) -> None:
        bench = replace(bench, agreement=follows, physics=False)
        self.probes = [Probe(bench, one, scorers.get(one.sample.scorer), corners, follows=follows) for one in asked]

    def full(self) -> list[Found]:
        """What the full cache does, prompt by prompt."""
        return [probe.full for probe in self.probes]

    def measure(self, recipe: Recipe) -> list[Found]:
        """What a recipe does, prompt by prompt.

        Raises:
            KvthriftError: it cannot be honoured, or ran out of memory.
            RunError: the GPU is lost.
        """
        return list(self._all(recipe))

    def _all(self, recipe: Recipe) -> Iterator[Found]:
        for probe in self.probes:
            found = attempt(partial(probe.measure, recipe))
            if isinstance(found, Failure):
                raise KvthriftError(f"{found.reason}: {found.message}")
            yield found

    def close(self) -> None:
        """Nothing to end here."""


def combined(found: Sequence[Found]) -> Measured:
    """All prompts together; means, but for tokens that agree, which are counted."""
    rows = sorted(found, key=lambda row: row["number"])  # as floats add up otherwise in another order
    steps = sum(row["steps"] for row in rows)
    means: dict[str, Any] = {
        key: fmean(row[key] for row in rows) for key in ("score", "bytes", "full_bytes", "entries", "full_entries")
    }
    agreement = sum(row["agreed"] for row in rows) / steps if steps else math.nan
    return Measured(**means, agreement=agreement, most_bytes=max(row["bytes"] for row in rows))
