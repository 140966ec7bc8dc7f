"""What an arm's cache took: entries, bytes, seconds. Records and their sums; nothing here measures.

Bytes are those of live tensors behind the reading, before any question (question hidden) or behind it (visible).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    Attributes:
        entries: in all compressed layers.
        full_entries: what an uncompressed cache would hold there.
        bytes: of live tensors, metadata included.
        metadata_bytes: those that are not keys and values.
        full_bytes: keys and values of an uncompressed cache.
        read_bytes: keys and values (and what biases them) that one decode step attends to.
    """

    entries: int
    full_entries: int
    bytes: int
    metadata_bytes: int
    full_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Cost:
    """One arm's cost on one reading.

    Attributes:
        held: behind the reading.
        alone: whether this arm read the prompt by itself. If not, the reading was shared by all arms, and what it took
            is not this arm's own: ``peak_bytes`` is None, ``prefill_seconds`` everybody's, and steps are slower,
            because pages are shared.
        peak_bytes: most bytes held at once while reading.
        prefill_seconds: the reading, compression included if alone.
        question_seconds: feeding hidden or later questions, up to the first new token of each.
        compression_seconds: choosing and moving what stays.
        step_seconds: every decode step.
    """

    held: Held
    alone: bool
    peak_bytes: int | None
    prefill_seconds: float
    question_seconds: float
    compression_seconds: float
    step_seconds: tuple[float, ...]


def combined(costs: Sequence[Cost]) -> dict[str, Any]:
    """One sample's cost as plain data: sizes are means over its readings, peaks maxima, seconds sums."""
    sizes = [asdict(cost.held) for cost in costs]
    steps = [second for cost in costs for second in cost.step_seconds]
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return {
        **{name: round(fmean(size[name] for size in sizes)) for name in sizes[0]},
        "peak_bytes": max(peaks) if len(peaks) == len(costs) else None,
        "alone": all(cost.alone for cost in costs),
        "seconds": {
            "prefill": _round(sum(cost.prefill_seconds for cost in costs)),
            "question": _round(sum(cost.question_seconds for cost in costs)),
            "compression": _round(sum(cost.compression_seconds for cost in costs)),
            "decode": _round(sum(steps)),
            "step": _round(median(steps)) if steps else None,
        },
    }


def _round(seconds: float) -> float:
    return float(f"{seconds:.6g}")
