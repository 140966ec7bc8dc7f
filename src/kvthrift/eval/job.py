"""One sample's share of a run: what is measured in one go, by this process or by another.

Made to be sent: it holds no model. Knows nothing of processes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvthrift.eval.arm import Arm
from kvthrift.eval.bench import Bench
from kvthrift.eval.record import Score, blank_row, failed_row
from kvthrift.eval.round import Round
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample
from kvthrift.eval.snapshot import Snapshot

Keep = Callable[[Snapshot], None]


@dataclass
class Job:
    """A sample with its question visible or hidden, and the arms that have no row of it yet.

    Attributes:
        turn: makes the round, given ``bench``, ``missing``, ``score`` and ``keep``.
        place: number of the task in the grid, and of the sample in the task.
        missing: in the order in which they are measured.
        session: number of this start of the run.
        recorded: whether snapshots of the caches are wanted.
        alone: whether each arm reads by itself.
    """

    turn: Callable[..., Round]
    sample: Sample
    place: tuple[int, int]
    visible: bool
    missing: list[Arm]
    session: int
    recorded: bool = False
    alone: bool = False

    def round(self, bench: Bench, scorers: Mapping[str, Score], keep: Keep | None = None) -> Round:
        """What is to be gone through."""
        score = scorers.get(self.sample.scorer)
        return self.turn(bench=bench, missing=tuple(self.missing), score=score, keep=keep)

    def rows(self, bench: Bench, scorers: Mapping[str, Score], keep: Keep | None) -> Iterator[Row]:
        """A row for each missing arm, as soon as it is known; ``keep`` is given its snapshot before, if one is wanted.

        Raises:
            RunError: the GPU is lost.
        """
        for row in self.round(bench, scorers, keep if self.recorded else None).rows():
            yield {**row, "place": list(self.place)}

    def heard(self, row: Row) -> None:
        """Note that a row is there."""
        self.missing = [arm for arm in self.missing if arm.name != row["arm"]]

    def failed(self, arm: Arm, reason: str, message: str) -> Row:
        """The row of an arm that cannot be measured."""
        blank = blank_row(self.sample, arm, visible=self.visible, session=self.session)
        return {**failed_row(blank, reason, message), "place": list(self.place)}
