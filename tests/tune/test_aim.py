"""EvolKV's objective as specified, and what a floor and two values make of measurements."""

from __future__ import annotations

import math

import pytest

from kvthrift import OptionError
from kvthrift.tune.aim import WORST, Aim, Measured, cache_score, reward


@pytest.mark.parametrize(("mean", "wanted"), [(128, 1), (192, 0.5), (256, 0), (300, 0), (64, 0.9), (0, 0.8)])
def test_the_cache_score_at_128(mean: float, wanted: float) -> None:
    assert cache_score(mean, 128) == pytest.approx(wanted)


def test_the_reward() -> None:
    assert reward(0.5, 128, 128) == pytest.approx(0.65)
    assert reward(0.5, 256, 128) == pytest.approx(0.5)


def measured(agreement: float, held: float, score: float = math.nan) -> Measured:
    return Measured(score, agreement, held, 1000.0, held / 10, 100.0, held)


def test_fewer_bytes_are_better_above_the_floor_and_nothing_below_it_is() -> None:
    aim = Aim("bytes", floor=0.99)
    small, large = (aim.fitness(measured(0.99, held), 1, 1, 1) for held in (100.0, 200.0))
    below, far = (aim.fitness(measured(share, 1.0), 1, 1, 1) for share in (0.98, 0.5))
    assert small > large > below > far > WORST


def test_entries_break_ties_between_as_many_pages() -> None:
    aim = Aim("bytes", floor=0.9)
    one, other = Measured(1, 1, 64, 1000, 10, 100, 64), Measured(1, 1, 64, 1000, 11, 100, 64)
    assert aim.fitness(one, 1, 1, 1) > aim.fitness(other, 1, 1, 1)


def test_a_floor_of_score_is_a_share_of_the_full_caches() -> None:
    aim = Aim("bytes", "score", floor=0.5)
    assert aim.fitness(measured(math.nan, 10, score=0.2), 1, 1, 0.4) > 0
    assert aim.fitness(measured(math.nan, 10, score=0.19), 1, 1, 0.4) < 0


def test_what_is_not_a_number_has_no_fitness() -> None:
    for objective in ("score", "bytes"):
        assert math.isnan(Aim(objective, "score").fitness(measured(1.0, 10.0), 1, 1, 1))


@pytest.mark.parametrize(
    "options", [{"objective": "speed"}, {"quality": "kl"}, {"floor": 0.0}, {"floor": 1.1}, {"lam": -1}, {"gamma": 2}]
)
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Aim(**options)
