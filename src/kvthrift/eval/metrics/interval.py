"""Bootstrap intervals for means over paired samples.

Every arm is resampled by the same draw of samples, so that differences between arms are paired, and each task by its
own draw, so that a mean over tasks weighs tasks alike. Knows nothing of what is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 4000
LEVEL = 0.95
BLOCK = 1 << 22  # numbers gathered at once


@dataclass(frozen=True)
class Interval:
    """A mean, and the bounds of its percentile interval; None where there is too little to draw from."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def replicates(scores: Floats, *, label: str, draws: int = DRAWS) -> Floats:
    """Means ``[A, draws]`` of A arms over resampled columns of ``scores [A, N]``, the same columns for every arm.

    Args:
        scores: one row an arm, one column a sample.
        label: decides the draw, so that it is the same in every call with this label and N.
        draws: how many.
    """
    arms, count = scores.shape
    rng = np.random.default_rng([crc32(label.encode()), count])
    out = np.empty((arms, draws))
    step = max(1, BLOCK // max(arms * count, 1))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        columns = rng.integers(count, size=(size, count))
        out[:, start : start + size] = scores[:, columns].mean(axis=-1)
    return out


def interval(mean: float, drawn: Floats, samples: int, level: float = LEVEL) -> Interval:
    """The percentile interval of replicated means ``drawn [draws]`` over that many samples (a pair at least)."""
    if samples < 2:
        return Interval(mean, None, None)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class Means:
    """One arm's mean over tasks, and its difference to the reference arm on the same samples."""

    tasks: dict[str, Interval]
    mean: Interval
    difference: Interval
    differences: dict[str, Interval]


def paired_means(
    scores: Mapping[str, Floats], reference: int, *, draws: int = DRAWS, level: float = LEVEL
) -> list[Means]:
    """Means, and paired differences to one arm, with intervals.

    Args:
        scores: task -> ``[A, N]``, arms in the same order, N samples that all arms have.
        reference: the arm that others are compared with.
        draws: resamples.
        level: of the intervals.

    Returns:
        One for each arm; the mean over tasks weighs tasks alike.
    """
    drawn = {task: replicates(table, label=task, draws=draws) for task, table in scores.items()}
    fewest = min(table.shape[1] for table in scores.values())
    whole = np.mean([table.mean(axis=1) for table in scores.values()], axis=0)
    every = np.mean(list(drawn.values()), axis=0)
    out = []
    for arm in range(len(whole)):
        tasks, differences = {}, {}
        for task, table in scores.items():
            count, gap = table.shape[1], table[arm] - table[reference]
            tasks[task] = interval(float(table[arm].mean()), drawn[task][arm], count, level)
            differences[task] = interval(float(gap.mean()), drawn[task][arm] - drawn[task][reference], count, level)
        mean = interval(float(whole[arm]), every[arm], fewest, level)
        gap_mean = float(whole[arm] - whole[reference])
        out.append(Means(tasks, mean, interval(gap_mean, every[arm] - every[reference], fewest, level), differences))
    return out
