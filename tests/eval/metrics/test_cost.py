"""Costs of several readings as one."""

from __future__ import annotations

from kvthrift.eval.metrics.cost import Cost, Held, combined


def cost(size: int, *, peak: int | None, steps: tuple[float, ...] = (0.1,)) -> Cost:
    return Cost(Held(size, 2 * size, size, 1, 4 * size, size), peak is not None, peak, 1.0, 0.5, 0.25, steps)


def test_sizes_are_means_peaks_maxima_seconds_sums() -> None:
    found = combined([cost(100, peak=7), cost(200, peak=9, steps=(0.2, 0.3))])
    assert (found["entries"], found["full_entries"], found["bytes"]) == (150, 300, 150)
    assert found["peak_bytes"] == 9
    assert found["alone"]
    seconds = found["seconds"]
    assert (seconds["prefill"], seconds["question"], seconds["compression"]) == (2.0, 1.0, 0.5)
    assert (seconds["decode"], seconds["step"]) == (0.6, 0.2)


def test_a_shared_reading_has_no_peak() -> None:
    found = combined([cost(100, peak=None, steps=())])
    assert found["peak_bytes"] is None
    assert not found["alone"]
    assert found["seconds"]["step"] is None
