"""Controls are always there, once, at every budget that a method has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvthrift import method
from kvthrift.errors import BudgetError, RecipeError, UnknownNameError
from kvthrift.eval.arm import arms, redrawn
from kvthrift.eval.config import Grid


def names(**values: Any) -> list[str]:
    return [arm.name for arm in arms(Grid.build({"tasks": "x", **values}))]


def test_controls_are_added() -> None:
    assert names(methods="snapkv,knorm", budgets="64,10%") == [
        "full", "random@64", "random@10%", "streamingllm@64", "streamingllm@10%",
        "snapkv@64", "snapkv@10%", "knorm@64", "knorm@10%",
    ]  # fmt: skip


def test_named_controls_are_there_once() -> None:
    found = names(methods="random,full,snapkv", budgets="64")
    assert sorted(found) == ["full", "random@64", "snapkv@64", "streamingllm@64"]
    controls = {arm.name: arm.control for arm in arms(Grid.build({"tasks": "x", "methods": "random", "budgets": "64"}))}
    assert controls == {"full": True, "streamingllm@64": True, "random@64": True}


def test_one_that_finds_its_own_budget_is_one_arm_without_one(tmp_path: Path) -> None:
    assert names(methods="dbudgetkv,knorm", budgets="64,96")[-3:] == ["dbudgetkv@own", "knorm@64", "knorm@96"]
    method("dbudgetkv").with_options(name="mine").save(tmp_path / "a.toml")
    found = arms(Grid.build({"tasks": "x", "methods": "", "recipes": [str(tmp_path / "a.toml")], "budgets": "64"}))
    assert [(arm.name, arm.budget) for arm in found] == [("full", "all"), ("mine@own", "own")]


def test_full_alone() -> None:
    assert names(methods="full", budgets="64") == ["full"]


def test_options_reach_methods() -> None:
    made = Grid.build({"tasks": "x", "methods": "snapkv", "budgets": "64", "options": {"snapkv": {"window": 8}}})
    assert next(arm for arm in arms(made) if arm.name == "snapkv@64").recipe == method("snapkv", budget=64, window=8)


def test_options_of_methods_that_are_not_run_have_no_effect() -> None:
    assert (
        names(methods="knorm", budgets="64", options={"snapkv": {"window": 3}, "random": {"seed": 4}})[-1] == "knorm@64"
    )


def test_recipe_files(tmp_path: Path) -> None:
    with_budget, without = tmp_path / "a.toml", tmp_path / "b.json"
    method("knorm", budget=96).with_options(name="mine").save(with_budget)
    method("knorm").with_options(name="yours").save(without)
    found = names(methods="", recipes=[str(with_budget), str(without)], budgets="64")
    assert found == ["full", "random@96", "random@64", "streamingllm@96", "streamingllm@64", "mine@96", "yours@64"]
    with pytest.raises(RecipeError, match="two arms would be called mine@96"):
        names(
            methods="",
            recipes=[str(with_budget), str(with_budget).replace("a.toml", "../" + tmp_path.name + "/a.toml")],
        )


def test_budgets_below_what_is_protected_are_refused() -> None:
    with pytest.raises(BudgetError, match="16 entries"):
        names(methods="snapkv", budgets="16")
    with pytest.raises(BudgetError):
        names(methods="knorm", budgets="0")
    assert "knorm@1%" in names(methods="knorm", budgets="1%")  # depends on the sample: a row says so


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="snapkv"):
        names(methods="snapvk")
    with pytest.raises(UnknownNameError, match="Did you mean 'snapkv'"):
        names(methods="knorm", options={"snapvk": {"window": 3}})
    with pytest.raises(UnknownNameError, match="option of method snapkv"):
        names(methods="snapkv", options={"snapkv": {"windows": 3}})


def test_chance_is_drawn_anew_for_every_sample() -> None:
    made = {arm.name: arm for arm in arms(Grid.build({"tasks": "x", "methods": "snapkv", "budgets": "64"}))}
    random = made["random@64"]
    first, again, second = (redrawn(random, label) for label in ("a/1", "a/1", "a/2"))
    assert first == again
    assert len({random.recipe, first.recipe, second.recipe}) == 3
    assert first.name == random.name
    assert redrawn(made["snapkv@64"], "a/1") is made["snapkv@64"]
    other = {"tasks": "x", "methods": "random", "budgets": "64", "options": {"random": {"seed": 5}}}
    assert redrawn(arms(Grid.build(other))[-1], "a/1") != first
