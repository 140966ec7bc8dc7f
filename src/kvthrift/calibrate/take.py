"""A list of measurements, taken one by one, resumable, and made into one artefact at the end. Knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvthrift.calibrate.artefact import Artefact, check_free, save
from kvthrift.calibrate.partial import Partial

Result = dict[str, Any]
Job = tuple[str, Callable[[list[Result]], Result]]
"""What is done, in words for a person, and a function from earlier results to this one as plain data."""


def take(
    target: str | Path,
    settings: Mapping[str, Any],
    jobs: Sequence[Job],
    finish: Callable[[list[Result]], Artefact],
    *,
    force: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Artefact:
    """Do the jobs in order, and write what ``finish`` makes of their results.

    Results are kept beside ``target`` until it is written; a run that was cut short goes on from them.

    Args:
        target: the file to write.
        settings: what every result depends on.
        jobs: what to measure.
        finish: all results -> the artefact.
        force: replace a file that is there, and begin anew where results of other settings are kept.
        progress: told how far each stage is.

    Raises:
        CalibrationError: the file is there or cannot be written, or ``finish`` finds nothing.
    """
    check_free(target, force=force)
    stages = [stage for stage, _ in jobs]
    with Partial.open(target, settings, force=force) as partial:
        for number in range(len(partial.results), len(jobs)):
            stage, job = jobs[number]
            if progress is not None:
                progress(stage, (number - stages.index(stage)) / stages.count(stage))
            partial.add(job(partial.results))
            if progress is not None and (number + 1 == len(jobs) or stages[number + 1] != stage):
                progress(stage, 1.0)
        found = finish(partial.results[: len(jobs)])
        save(target, found.tensors, found.meta, force=force)
        partial.remove()
    return found
