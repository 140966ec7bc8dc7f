"""What may vary: declared options with ranges that parts take, budgets by layer, and recipes at a place."""

from __future__ import annotations

import pytest
from tests.reading import deep

from kvthrift import BudgetError, KvthriftError, OptionError, Recipe, RecipeError, UnknownNameError, method
from kvthrift.allocate import BudgetLayers, TableHeads
from kvthrift.methods import methods
from kvthrift.tune.aim import Aim
from kvthrift.tune.options import numeric_options, option_dim, with_option
from kvthrift.tune.plan import plan
from kvthrift.tune.space import BUDGET

SNAPKV = method("snapkv", budget=64, window=8)
HEADS = SNAPKV.with_options(heads=TableHeads(((1.0, 2.0),) * 4))


def planned(recipe: Recipe = SNAPKV, *vary: str, objective: str = "agreement", free: bool = True, page: int = 16):
    return plan(deep(4), recipe, Aim(objective), vary, longest=200, page=page, group=2, free=free)


def test_the_options_of_snapkv() -> None:
    found = numeric_options(SNAPKV)
    wanted = {"scorer.window": 8, "scorer.kernel": 7, "protect.sinks": 0, "protect.recent": 8}
    assert {path: found[path] for path in wanted} == wanted


@pytest.mark.parametrize("name", [name for name in methods() if name not in ("full",)])
def test_every_method_has_options_or_none_and_both_ends_are_taken(name: str) -> None:
    recipe = method(name)
    for path, now in numeric_options(recipe).items():
        try:
            dim = option_dim(recipe, path)
        except OptionError:
            continue
        assert dim.low <= now <= dim.high
        for end in (dim.low, dim.high):
            tries = [end, end - 1, end + 1] if dim.whole else [end]
            assert any(_taken(recipe, path, value) for value in tries)


def _taken(recipe: Recipe, path: str, value: float) -> bool:
    try:
        with_option(recipe, path, value)
    except KvthriftError:
        return False
    return True


def test_an_even_kernel_becomes_an_odd_one() -> None:
    space = planned(SNAPKV, "scorer.kernel=3:9")
    assert space.recipe({"scorer.kernel": 4}).scorer.kernel == 5
    assert space.recipe({"scorer.kernel": 7}) == SNAPKV


def test_the_start_is_the_recipe_in_a_list() -> None:
    space = planned()
    start = space.recipe(space.start)
    assert isinstance(start.layers, BudgetLayers)
    assert start.layers.entries == (64,) * 4
    assert start.with_options(layers=SNAPKV.layers, budget=SNAPKV.budget) == SNAPKV


def test_a_place_keeps_its_own_mean_and_is_completed_to_the_target() -> None:
    space = planned(SNAPKV, "layers")
    place = {"layer.0": 10, "layer.1": 20, "layer.2": 30, "layer.3": 5}
    found = space.recipe(place)
    assert found.layers.entries == (10, 20, 30, 8)  # no layer below what is protected
    assert str(found.budget) == "17"
    assert sum(space.completed(place).layers.entries) == 4 * 64
    assert space.completed(place).budget == SNAPKV.budget


def test_byte_budgets_are_dealt_out_in_pages() -> None:
    space = planned(method("snapkv", budget="64KiB", window=8), "layers")
    assert space.target % 16 == 0
    place = {f"layer.{n}": 20 + 9 * n for n in range(4)}
    assert all(count % 16 == 0 for count in space.table(place))
    assert all(count % 16 == 0 for count in space.completed(place).layers.entries)
    assert str(space.completed(place).budget) == "64KiB"


def test_fewer_bytes_vary_the_whole_budget() -> None:
    assert [dim.name for dim in planned(SNAPKV, "scorer.kernel", objective="bytes").dims] == ["scorer.kernel", BUDGET]
    space = planned(SNAPKV, "layers", objective="bytes", free=False)
    assert [dim.name for dim in space.dims] == ["layer.0-1", "layer.2-3", BUDGET]
    assert sum(space.table({"layer.0-1": 2.0, "layer.2-3": 1.0, BUDGET: 30})) == 120


def test_layers_left_whole_are_not_searched() -> None:
    space = planned(SNAPKV.with_options(skip=(0, -1)), "layers")
    assert [dim.name for dim in space.dims] == ["layer.1", "layer.2"]
    assert space.recipe(space.start).layers.entries == (0, 64, 64)


@pytest.mark.parametrize(
    ("recipe", "vary", "said"),
    [
        (method("full"), (), "keeps everything, so there is nothing to tune"),
        (method("pyramidkv", budget=64), ("layers",), "decides budgets by layer itself"),
        (HEADS, ("layers",), "shares room out over the heads of all layers"),
        (method("snapkv", budget=200), (), "nothing goes and every recipe is the same"),
        (SNAPKV, ("scorer.kernel=9:3",), "no room to vary"),
        (SNAPKV, ("scorer.kernel=9:31",), "outside the range"),
        (SNAPKV, ("scorer.kernel=wide",), "is no range"),
    ],
)
def test_what_cannot_be_searched_is_refused(recipe: Recipe, vary: tuple[str, ...], said: str) -> None:
    with pytest.raises((RecipeError, OptionError), match=said):
        planned(recipe, *vary)


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match=r"'scorer\.kernels'.*Valid: .*scorer\.kernel"):
        planned(SNAPKV, "scorer.kernels")


def test_a_budget_below_what_is_protected_is_refused() -> None:
    with pytest.raises(BudgetError, match="always keeps 0 sinks and 32 recent"):
        planned(method("snapkv", budget=16))
    with pytest.raises(BudgetError, match="always keeps 0 sinks and 32 recent"):
        planned(method("snapkv", budget="10%"))
