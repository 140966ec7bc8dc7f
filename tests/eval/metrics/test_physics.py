"""Worked examples of the attention-dynamics metrics, and what random eviction must give."""

from __future__ import annotations

import numpy as np
import pytest

from kvthrift.eval.metrics import physics
from kvthrift.eval.metrics.physics import Bools, Erasure

ARRAY = np.array


def kept(*layers: list[list[int]], tokens: list[int]) -> list[Bools]:
    """Survival of ``tokens`` where heads hold the listed positions."""
    return physics.survived([[ARRAY(head) for head in heads] for heads in layers], ARRAY(tokens))


FOUR = [[0, 1], [0, 2], [0, 1], [0, 4]]


def test_eviction_rate_of_the_worked_example() -> None:
    assert physics.erased(kept(FOUR, tokens=[0, 1, 2, 3, 4])) == Erasure(1 / 5, 1 / 5)


def test_global_eviction_ratio_of_the_worked_example() -> None:
    assert physics.erased(kept(FOUR, tokens=[3, 4])) == Erasure(0.5, 0.5)


def test_consensus_and_rigidity_of_the_worked_example() -> None:
    peaks = ARRAY([0, 0, 0, 4])
    assert physics.consensus(peaks) == 2 / 4
    assert physics.rigidity(peaks) == 3 / 4


def test_a_full_cache_erases_nothing() -> None:
    whole = kept([[0, 1, 2], [0, 1, 2]], tokens=[0, 1, 2])
    assert physics.erased(whole) == physics.chance(whole) == Erasure(0.0, 0.0)
    assert physics.removed(whole) == 0


def test_layers_and_the_model_differ() -> None:
    found = kept([[0]], [[1]], tokens=[0, 1, 2])
    assert physics.erased(found) == Erasure(pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_shared_sets_are_the_worst_case() -> None:
    same = kept([[0, 1]] * 8, tokens=list(range(10)))
    assert physics.erased(same).layer == physics.removed(same) == pytest.approx(0.8)


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, 0.5**8), (0.9, 0.9**8)])
def test_random_eviction_gives_its_reference(alpha: float, expected: float) -> None:
    rng = np.random.default_rng(0)
    heads, tokens = 8, 20_000
    stays = [np.sort(rng.permutation(tokens)[: round(tokens * (1 - alpha))]) for _ in range(heads)]
    found = physics.survived([stays], np.arange(tokens))
    assert physics.chance(found).layer == pytest.approx(expected)
    assert physics.erased(found).layer == pytest.approx(expected, abs=4 * (expected / tokens) ** 0.5)


def test_the_reference_of_a_model_is_the_product_of_its_layers() -> None:
    found = kept([[0], [1]], [[2], [3]], tokens=[0, 1, 2, 3])
    assert physics.chance(found) == Erasure(pytest.approx(0.75**2), pytest.approx(0.75**4))


def test_bounds_of_consensus() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        heads = int(rng.integers(1, 9))
        peaks = rng.integers(0, 5, size=heads)
        share, rigid = physics.consensus(peaks), physics.rigidity(peaks)
        assert 1 / heads <= share <= 1
        assert 1 / heads <= rigid <= 1
        assert (share == 1 / heads) == (rigid == 1)


def test_failures_recombine() -> None:
    rng = np.random.default_rng(2)
    failed, gone = (list(rng.random(50) < share) for share in (0.4, 0.3))
    found = physics.decompose(failed, gone)
    assert found is not None
    assert found.failed_if_erased is not None
    assert found.failed_if_kept is not None
    whole = found.failed_if_erased * found.erased + found.failed_if_kept * (1 - found.erased)
    assert whole == pytest.approx(found.failed)


def test_a_condition_without_cases_is_not_a_number() -> None:
    found = physics.decompose([True, False], [False, False])
    assert found is not None
    assert (found.failed_if_erased, found.failed_if_kept) == (None, 0.5)
    assert physics.decompose([], []) is None


def test_no_relevant_tokens() -> None:
    assert physics.erased(kept(FOUR, tokens=[])) == Erasure(0.0, 0.0)
