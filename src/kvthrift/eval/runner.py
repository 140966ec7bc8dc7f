"""The run of a grid: task by task, sample by sample, arm by arm, a row as soon as it is known.

What is in the run's folder already is not measured again. Knows no method, no task and no metric by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvthrift.errors import DataError, UnknownNameError
from kvthrift.eval.arm import Arm, redrawn
from kvthrift.eval.bench import Bench, PlainTokenizer
from kvthrift.eval.config import Grid
from kvthrift.eval.folder import RunFolder
from kvthrift.eval.record import LIKELIHOOD, Key, Score, key_of, question
from kvthrift.eval.round import Round
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample, Task


@dataclass
class Progress:
    """How far a run is: rows there are, rows there will be, and the newest one if this start made it."""

    done: int
    total: int
    row: Row | None = None


@dataclass(frozen=True)
class Runner:
    """Everything a run needs.

    Attributes:
        tasks: those that the grid names.
        scorers: by name.
        tell: called with the progress after every row, and after every sample that was there already.
        retry: measure again what failed in an earlier start.
    """

    bench: Bench
    grid: Grid
    arms: tuple[Arm, ...]
    tasks: Sequence[Task]
    scorers: dict[str, Score]
    tell: Callable[[Progress], None] = field(default=lambda _: None)
    retry: bool = False

    def check(self) -> None:
        """Refuse, before anything is read, what could not be run: each task makes its first sample.

        Raises:
            KvthriftError: a recipe does not suit the model, the length is beyond it or too short for a task, or a
                task's data is not there.
        """
        self.bench.check_arms(self.arms)
        self.bench.check_length(self.grid.length, "a sample")
        self.bench.warm_up(self.arms[0])
        for task in self.tasks:
            first = next(self._samples(task, 1), None)
            if first is None:
                raise DataError(f"task {task.name} has no samples of {self.grid.length} tokens. Check its data folder.")
            self._scorer(first)

    def run(self, folder: RunFolder) -> None:
        """Go through the grid, from where the folder's rows end.

        Raises:
            RunError: a row cannot be written, or the GPU is lost.
            DataError: a task's data ends in damage.
        """
        done = {key_of(row) for row in folder.rows.found if not (self.retry and row["error"])}
        rows_a_sample = len(self.arms) * len(self.grid.visibilities)
        progress = Progress(0, len(self.tasks) * self.grid.samples * rows_a_sample)
        for task in self.tasks:
            count = 0
            for sample in self._samples(task, self.grid.samples):
                self._sample(sample, count, done, folder, progress)
                count += 1
            progress.total -= (self.grid.samples - count) * rows_a_sample

    def _sample(self, sample: Sample, number: int, done: set[Key], folder: RunFolder, progress: Progress) -> None:
        arms = [redrawn(arm, f"{sample.task}/{sample.id}") for arm in self.arms]
        for visible in self.grid.visibilities:
            there = [(sample.task, sample.id, question(visible), arm.name) in done for arm in self.arms]
            progress.done, progress.row = progress.done + sum(there), None
            self.tell(progress)
            turn = Round(
                self.bench,
                sample,
                arms=arms,
                missing=[arm for arm, found in zip(arms, there, strict=True) if not found],
                score=self._scorer(sample),
                visible=visible,
                alone=self.grid.alone < 0 or number < self.grid.alone,
                session=folder.session,
            )
            for row in turn.rows() if turn.missing else ():
                folder.rows.append(row)
                progress.done, progress.row = progress.done + 1, row
                self.tell(progress)

    def _samples(self, task: Task, count: int) -> Iterator[Sample]:
        data = Path(self.grid.data) if self.grid.data else None
        tokenizer = PlainTokenizer(self.bench.tokenizer)
        return task.samples(tokenizer, length=self.grid.length, count=count, seed=self.grid.seed, data=data)

    def _scorer(self, sample: Sample) -> Score | None:
        if sample.scorer == LIKELIHOOD:
            return None
        if sample.scorer not in self.scorers:
            raise UnknownNameError(f"scorer of task {sample.task}:", sample.scorer, self.scorers)
        return self.scorers[sample.scorer]
