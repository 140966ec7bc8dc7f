"""EvolKV's search on a made-up fitness: it approaches the target, never falls, and changes one group at a time."""

from __future__ import annotations

import pytest

from kvthrift import MissingPackageError, OptionError, method
from kvthrift.tune.evolve import Schedule, evolve
from kvthrift.tune.sample import check_optuna, sample
from kvthrift.tune.space import LAYER, Layers, Space, Values, layer_dims

TARGET = 100
WANTED = {n: (180, 40, 120, 60, 150, 20)[n] for n in range(6)}


def space(group: int = 3, *, free: bool = True) -> Space:
    layers = Layers(tuple(range(6)), "", 8, 400, 1, group, free)
    base = method("snapkv", budget=TARGET, window=8)
    return Space(base, TARGET, tuple(layer_dims(layers, TARGET, dict.fromkeys(range(6), TARGET))), layers)


def fitness(values: Values) -> float:
    """Nothing but the distance from what is wanted: lambda = 0."""
    return 1e6 - sum((values[f"{LAYER}{n}"] - wanted) ** 2 for n, wanted in WANTED.items())


def searched(seed: int = 0, group: int = 3) -> tuple[Values, list[Values]]:
    asked: list[Values] = []

    def ask(values: Values) -> float:
        asked.append(values)
        return fitness(values)

    return evolve(space(group), ask, Schedule(6 // group, 40, 10), seed=seed), asked


@pytest.mark.parametrize("group", [1, 3, 6])
def test_the_search_approaches_the_target(group: int) -> None:
    best, _ = searched(group=group)
    for n, wanted in WANTED.items():
        assert best[f"{LAYER}{n}"] == pytest.approx(wanted, abs=4 if group < 6 else 16)  # six at once take longer


def test_the_best_never_falls_and_groups_before_and_behind_stay() -> None:
    best, asked = searched()
    first, second = asked[1:401], asked[401:]
    assert asked[0] == dict.fromkeys((f"{LAYER}{n}" for n in range(6)), TARGET)
    assert all(values[f"{LAYER}{n}"] == TARGET for values in first for n in (3, 4, 5))
    settled = max(asked[:401], key=fitness)
    assert all(values[f"{LAYER}{n}"] == settled[f"{LAYER}{n}"] for values in second for n in (0, 1, 2))
    assert fitness(best) == max(map(fitness, asked))


def test_candidates_are_whole_and_between_the_window_and_the_prompt() -> None:
    _, asked = searched()
    assert all(isinstance(count, int) and 8 <= count <= 400 for values in asked for count in values.values())


def test_the_same_seed_asks_the_same() -> None:
    assert searched(3)[1] == searched(3)[1]
    assert searched(3)[1] != searched(4)[1]


def test_a_schedule_spends_what_it_may() -> None:
    assert Schedule.within(401, [8] * 4) == Schedule(4, 10, 10)
    assert Schedule.within(97, [8] * 4) == Schedule(4, 3, 8)
    for trials in range(17, 300):
        assert Schedule.within(trials, [8] * 4).trials <= trials
    with pytest.raises(OptionError, match="trials=16 is too few"):
        Schedule.within(16, [8] * 4)


def test_optuna_approaches_it_too_and_repeats() -> None:
    def run() -> list[float]:
        found: list[float] = []
        wanted = (150, 50)

        def worth(values: Values) -> tuple[float]:
            table = space(3, free=False).table(values)
            assert sum(table) == TARGET * 6
            found.append(-sum((table[3 * n] - wanted[n]) ** 2 for n in range(2)))
            return (found[-1],)

        sample(space(3, free=False), worth, trials=40, values=1, seed=1)
        return found

    first = run()
    assert max(first) > -100
    assert first == run()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kvthrift\[tune\]'"):
        searched()
    with pytest.raises(MissingPackageError, match=r"pip install 'kvthrift\[tune\]'"):
        check_optuna()
