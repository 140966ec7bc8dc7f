"""One sample under all arms: read once, answered by the full cache first, then by every other arm; a row for each.

Whatever goes wrong with an arm becomes its row. Knows no method, no task and no metric by name.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from kvthrift.errors import KvthriftError, RunError
from kvthrift.eval.arm import FULL, Arm
from kvthrift.eval.bench import Bench
from kvthrift.eval.decode import Read, read
from kvthrift.eval.measure import Part, Reference, Work
from kvthrift.eval.prompt import Prompt, Reading, build_prompt, tokenize
from kvthrift.eval.record import LIKELIHOOD, Score, blank_row, failed_row, measured_row, reason_of
from kvthrift.eval.recorder import Recorder
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample
from kvthrift.eval.snapshot import Snapshot

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why an arm has no result."""

    reason: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Say it, and give back what memory the attempt took."""
        return cls(reason_of(error), " ".join(str(error).split()))


@dataclass(frozen=True)
class Round:
    """A sample, and the arms that have no row for it yet.

    Attributes:
        arms: all arms of the grid, the full cache first. What every one of them looks at is gathered whichever are
            missing, so that a run that was cut short computes the same numbers as one that was not.
        missing: those that need a row.
        score: the sample's scorer; None where answers are weighed.
        visible: whether the question is read with the context.
        alone: whether each arm reads by itself.
        session: number of this start of the run.
        keep: given the snapshot of each arm that goes through, before its row is yielded; None makes none.
    """

    bench: Bench
    sample: Sample
    arms: Sequence[Arm]
    missing: Sequence[Arm]
    score: Score | None
    visible: bool
    alone: bool
    session: int
    keep: Callable[[Snapshot], None] | None = None

    def rows(self) -> Iterator[Row]:
        """A row for each missing arm, as soon as it is known.

        Raises:
            RunError: the GPU is lost, so that nothing can be measured any more.
        """
        try:
            prompt = build_prompt(self.bench.tokenizer, self.sample, visible=self.visible)
            self.bench.check_length(prompt.longest, f"sample {self.sample.id} of {self.sample.task} with its answer")
        except KvthriftError as error:
            for arm in self.missing:
                yield self.row(arm, Failure.of(error))
            return
        done: dict[str, list[Part]] = {arm.name: [] for arm in self.missing}
        recorder = Recorder(self.bench, self.sample, prompt, visible=self.visible)
        for reading in prompt.readings:
            for arm, found in self._outcomes(prompt, reading, done, recorder):
                if isinstance(found, Part):
                    done[arm.name].append(found)
                    if len(done[arm.name]) == len(prompt.readings):
                        row = self.row(arm, done[arm.name], prompt)
                        self._keep(recorder, arm, done[arm.name][0], row)
                        yield row
                else:
                    del done[arm.name]
                    yield self.row(arm, found)

    def _outcomes(
        self, prompt: Prompt, reading: Reading, wanted: dict[str, list[Part]], recorder: Recorder
    ) -> Iterator[tuple[Arm, Part | Failure]]:
        """What each wanted arm did on one reading; the full cache answers first, wanted or not."""
        limits = [turn.max_new_tokens for turn in self.sample.turns]
        recorded = self.keep is not None and reading is prompt.readings[0]
        work = Work(self.bench, prompt, reading, limits, self._given(), self._shared(reading), recorded)
        reference: Reference | None = None
        for arm in self.arms:
            if arm.name == FULL:
                answered = attempt(partial(work.full, arm))
                found, reference = (answered, None) if isinstance(answered, Failure) else answered
                recorder.hear(reference or {})
                if arm.name in wanted:
                    yield arm, found
            elif arm.name in wanted:
                yield arm, attempt(partial(work.compressed, arm, reference))

    def _keep(self, recorder: Recorder, arm: Arm, part: Part, row: Row) -> None:
        """Hand on the snapshot that belongs to a row; one that cannot be made spoils no row."""
        if self.keep is None or row["error"]:
            return
        found = attempt(lambda: recorder.snapshot(arm, part))
        if not isinstance(found, Failure):
            self.keep(found)

    def _shared(self, reading: Reading) -> Read | None:
        """The reading for all arms; None if each is to read alone, or if there is no room for this one."""
        if self.alone:
            return None
        recipes = [arm.recipe for arm in self.arms if arm.name != FULL]
        full, page = self.arms[0].recipe, self.bench.page
        model, tokenizer = self.bench.model, self.bench.tokenizer
        found = attempt(lambda: read(model, reading.ids, full, page=page, observe=recipes, tokenizer=tokenizer))
        return None if isinstance(found, Failure) else found

    def _given(self) -> dict[int, tuple[int, ...]]:
        if self.sample.scorer != LIKELIHOOD:
            return {}
        return {
            number: tokenize(self.bench.tokenizer, turn.answers[0]) for number, turn in enumerate(self.sample.turns)
        }

    def row(self, arm: Arm, found: Sequence[Part] | Failure, prompt: Prompt | None = None) -> Row:
        """An arm's row, from what it did or why it did not."""
        blank = blank_row(self.sample, arm, visible=self.visible, session=self.session)
        if not isinstance(found, Failure) and prompt is not None:
            parts = found
            row = attempt(lambda: measured_row(blank, self.sample, prompt, parts, self.bench.decode, self.score))
            if not isinstance(row, Failure):
                return row
            found = row
        assert isinstance(found, Failure)
        return failed_row(blank, found.reason, found.message)


def attempt(work: Callable[[], T]) -> T | Failure:
    """Do it; what goes wrong is told, not raised, and the memory it took given back.

    Raises:
        RunError: the GPU is lost.
    """
    try:
        return work()
    except RunError:
        raise
    except Exception as error:
        failure = Failure.of(error)
        lost = isinstance(error, torch.AcceleratorError) and failure.reason != "out of memory"
    gc.collect()
    if torch.cuda.is_available() and not lost:
        torch.cuda.empty_cache()
    if lost:
        raise RunError(
            f"the GPU is lost ({failure.message}), so nothing can be measured. Start again; the run goes on."
        )
    return failure
