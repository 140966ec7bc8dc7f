"""Paired bootstrap intervals: their coverage on data whose truth is known, and that pairs are pairs."""

from __future__ import annotations

import numpy as np
import pytest

from kvthrift.eval.metrics.interval import paired_means, replicates


def test_coverage_is_what_is_promised() -> None:
    rng = np.random.default_rng(0)
    held = trials = 0
    for trial in range(200):
        scores = rng.normal(5.0, 2.0, size=(1, 40))
        (found,) = paired_means({f"task {trial}": scores}, 0, draws=500)
        assert found.mean.low is not None
        assert found.mean.high is not None
        held += found.mean.low <= 5.0 <= found.mean.high
        trials += 1
    assert 0.88 <= held / trials <= 0.98  # percentile intervals of 40 samples are a little narrow


def test_pairing_removes_what_arms_share() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, size=60)
    scores = np.stack([hard, hard - 1 + rng.normal(0, 0.5, size=60)])
    full, other = paired_means({"task": scores}, 0)
    assert other.difference.mean == pytest.approx((scores[1] - scores[0]).mean())
    assert other.difference.high is not None
    assert other.difference.low is not None
    assert other.difference.high - other.difference.low < 0.5  # unpaired it would be about 7
    assert other.difference.excludes_zero
    assert full.difference.low == full.difference.high == 0
    assert not full.difference.excludes_zero


def test_tasks_weigh_alike() -> None:
    (found,) = paired_means({"long": np.zeros((1, 90)), "short": np.full((1, 10), 100.0)}, 0)
    assert found.mean.mean == 50
    assert (found.mean.low, found.mean.high) == (50, 50)


def test_same_as_drawing_one_by_one() -> None:
    scores = np.random.default_rng(2).normal(size=(3, 17))
    drawn = replicates(scores, label="x", draws=50)
    again = replicates(scores[:1], label="x", draws=50)
    assert drawn.shape == (3, 50)
    np.testing.assert_allclose(drawn[0], again[0])  # arms do not change the draw
    assert abs(drawn.mean() - scores.mean()) < 0.2


def test_a_single_sample_has_no_interval() -> None:
    (found,) = paired_means({"task": np.array([[3.0]])}, 0)
    assert found.mean.mean == 3
    assert found.mean.low is found.mean.high is None


def test_large_tables_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(3).normal(size=(2, 30))
    whole = replicates(scores, label="x", draws=64)
    monkeypatch.setattr("kvthrift.eval.metrics.interval.BLOCK", 7 * 60)
    np.testing.assert_array_equal(whole, replicates(scores, label="x", draws=64))
