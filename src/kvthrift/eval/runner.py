"""The run of a grid: task by task, sample by sample, arm by arm, a row as soon as it is known.

What is in the run's folder already is not measured again. Knows no method, no task and no metric by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvthrift.errors import DataError, OptionError, UnknownNameError
from kvthrift.eval.arm import Arm, redrawn
from kvthrift.eval.batch import Batch, joined
from kvthrift.eval.bench import Bench, PlainTokenizer
from kvthrift.eval.config import Grid
from kvthrift.eval.folder import RunFolder
from kvthrift.eval.job import Job
from kvthrift.eval.record import LIKELIHOOD, Key, Score, key_of, question
from kvthrift.eval.round import Round
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample, Task, shortened
from kvthrift.eval.workers import Crew


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
        crew: workers for all samples that are not timed; None to measure them here.
        batch: samples that are read and answered together, of those that are not timed and have one question.
    """

    bench: Bench
    grid: Grid
    arms: tuple[Arm, ...]
    tasks: Sequence[Task]
    scorers: dict[str, Score]
    tell: Callable[[Progress], None] = field(default=lambda _: None)
    retry: bool = False
    crew: Crew | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.batch > 1 and (self.grid.agreement or self.grid.physics):
            raise OptionError(
                f"a batch of {self.batch} samples is only answered: agreement and physics are measured sample by "
                "sample. Give --no-agreement and --no-physics, or no --batch."
            )

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
            RunError: a row cannot be written, the GPU is lost, or no worker can be started.
            DataError: a task's data ends in damage.
        """
        done = {key_of(row) for row in folder.rows.found if not (self.retry and row["error"])}
        rows_a_sample = len(self.arms) * len(self.grid.visibilities)
        progress = Progress(0, len(self.tasks) * self.grid.samples * rows_a_sample)
        snapshot = folder.snapshots.add if folder.snapshots else None
        if self.crew is None:
            for job in self._joined(self._jobs(folder, done, progress, (True, False))):
                for row in job.rows(self.bench, self.scorers, snapshot):
                    self._keep(row, folder, progress)
            return
        for job in self._jobs(folder, done, progress, (True,)):  # timed: with nothing else at work
            for row in job.rows(self.bench, self.scorers, snapshot):
                self._keep(row, folder, progress)
        left = self._jobs(folder, done, progress, (False,))
        with closing(self.crew.rows(self._joined(left), snapshot)) as found:
            for row in found:
                self._keep(row, folder, progress)

    def _joined(self, jobs: Iterator[Job]) -> Iterator[Job | Batch]:
        return joined(jobs, self.batch) if self.batch > 1 else jobs

    def _keep(self, row: Row, folder: RunFolder, progress: Progress) -> None:
        folder.rows.append(row)
        progress.done, progress.row = progress.done + 1, row
        self.tell(progress)

    def _jobs(self, folder: RunFolder, done: set[Key], progress: Progress, timed: tuple[bool, ...]) -> Iterator[Job]:
        """What is left to measure, in order.

        Args:
            timed: whether samples on which arms read alone are wanted, and whether the others are.
        """
        for place, task in enumerate(self.tasks):
            count = 0
            for sample in self._samples(task, self.grid.samples):
                alone = self.grid.alone < 0 or count < self.grid.alone
                if timed == (True,) and not alone:
                    break
                if alone in timed:
                    yield from self._job(sample, (place, count), alone, folder, done, progress)
                count += 1
            if False in timed:
                progress.total -= (self.grid.samples - count) * len(self.arms) * len(self.grid.visibilities)

    def _job(
        self, sample: Sample, place: tuple[int, int], alone: bool, folder: RunFolder, done: set[Key], progress: Progress
    ) -> Iterator[Job]:
        """One job for each visibility that lacks a row."""
        self._scorer(sample)
        arms = tuple(redrawn(arm, f"{sample.task}/{sample.id}") for arm in self.arms)
        for visible in self.grid.visibilities:
            there = [(sample.task, sample.id, question(visible), arm.name) in done for arm in self.arms]
            progress.done, progress.row = progress.done + sum(there), None
            self.tell(progress)
            missing = [arm for arm, found in zip(arms, there, strict=True) if not found]
            turn = partial(Round, sample=sample, arms=arms, visible=visible, alone=alone, session=folder.session)
            if missing:
                recorded = place[1] < self.grid.snapshots
                yield Job(turn, sample, place, visible, missing, folder.session, recorded, alone)

    def _samples(self, task: Task, count: int) -> Iterator[Sample]:
        data = Path(self.grid.data) if self.grid.data else None
        tokenizer = PlainTokenizer(self.bench.tokenizer)
        for sample in task.samples(tokenizer, length=self.grid.length, count=count, seed=self.grid.seed, data=data):
            yield shortened(sample, self.grid.max_new_tokens) if self.grid.max_new_tokens else sample

    def _scorer(self, sample: Sample) -> Score | None:
        if sample.scorer == LIKELIHOOD:
            return None
        if sample.scorer not in self.scorers:
            raise UnknownNameError(f"scorer of task {sample.task}:", sample.scorer, self.scorers)
        return self.scorers[sample.scorer]
