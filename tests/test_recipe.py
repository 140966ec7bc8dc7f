"""Recipes: what they refuse, and that a saved one is the one that comes back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvthrift import (
    BudgetError,
    KvthriftError,
    OptionError,
    Protect,
    Recipe,
    RecipeError,
    Trigger,
    UnknownNameError,
    method,
    methods,
)
from kvthrift.allocate import AdaptiveHeads, EntropyLayers, PyramidLayers, TableHeads
from kvthrift.codec import Integer4
from kvthrift.merge import MassFold
from kvthrift.score import KeyNorm, Recency, WindowAttention
from kvthrift.select import ChunkUnit, OutputAware

BUSY = Recipe(
    "mine",
    scorer=WindowAttention(16, pool="avg"),
    budget=method("snapkv", budget="12.5%").budget,
    layers=PyramidLayers(10, published_rounding=True),
    heads=TableHeads(((0.25, 0.5), (1.0, 0.0)), beta=1.1, protected=16, within="layer"),
    unit=ChunkUnit(5, per_head=True),
    refine=OutputAware(0.25),
    merge=MassFold(),
    protect=Protect(4, 16),
    trigger=Trigger(False, 64, 8),
    skip=(0, -1),
    reuse=2,
    rerotate=True,
    codec=Integer4(),
)


def through_json(recipe: Recipe) -> Recipe:
    return Recipe.from_plain(json.loads(recipe.to_json()))


def through_toml(recipe: Recipe) -> Recipe:
    return Recipe.from_plain(tomllib.loads(recipe.to_toml()))


@pytest.mark.parametrize("through", [through_json, through_toml])
@pytest.mark.parametrize("name", methods())
def test_every_methods_recipe_comes_back_equal(name: str, through: Callable[[Recipe], Recipe]) -> None:
    plain = method(name)
    again = through(plain)
    assert again == plain
    assert hash(again) == hash(plain)
    budget = None if name == "full" else "33.3%"
    changed = method(name, budget=budget, every=16, skip=(0, -1))
    assert through(changed) == changed
    assert through(changed) != plain
    assert str(through(changed)) == str(changed)


@pytest.mark.parametrize("through", [through_json, through_toml])
def test_a_recipe_with_every_field_set_comes_back_equal(through: Callable[[Recipe], Recipe]) -> None:
    assert through(BUSY) == BUSY
    assert set(BUSY.plain()) == {*Recipe.__dataclass_fields__, "format"}  # none of them is at its default


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_recipe_file_comes_back_equal(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recipe{suffix}"
    BUSY.save(path)
    assert Recipe.load(path) == BUSY
    assert Recipe.load(str(path)) == BUSY


def test_fields_at_their_defaults_are_left_out() -> None:
    assert Recipe("mine", KeyNorm()).plain() == {"format": 1, "name": "mine", "scorer": {"part": "key_norm"}}


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("window", 3, UnknownNameError, "unknown recipe field 'window'.*Valid: budget, codec, heads, layers, merge"),
        ("heads", {"part": "greedy"}, UnknownNameError, "unknown heads 'greedy'.*Valid: adaptive"),
        ("heads", {"part": "adaptive", "alpha": 1}, UnknownNameError, "'alpha'.*Valid: blend, safeguard"),
        ("heads", {"part": "adaptive", "safeguard": 7}, OptionError, "safeguard=7.0"),
        ("heads", "adaptive", RecipeError, "must be a table"),
        ("scorer", {"part": "window_attention", "window": 0}, OptionError, "window=0"),
        ("protect", {"sink": 4}, UnknownNameError, "'sink'.*Did you mean 'sinks'.*Valid: recent, sinks"),
        ("protect", {"sinks": -1}, OptionError, "sinks=-1"),
        ("protect", 4, OptionError, "must be a table"),
        ("trigger", {"every": 0}, OptionError, "every=0"),
        ("trigger", {"every": "often"}, OptionError, "every='often'"),
        ("trigger", {"min_turn": 1}, OptionError, "min_turn=1"),
        ("trigger", {"prompt": "perhaps"}, OptionError, "prompt='perhaps'"),
        ("skip", ["a"], OptionError, "skip='a'"),
        ("skip", 3, OptionError, "skip=3"),
        ("reuse", 0, OptionError, "reuse=0"),
        ("reuse", True, OptionError, "reuse=True"),
        ("rerotate", "sideways", OptionError, "rerotate='sideways'"),
        ("budget", "0%", BudgetError, "leave nothing"),
        ("budget", 0.5, BudgetError, "no unit"),
        ("format", 99, RecipeError, "format 99 is not 1"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(field: str, value: Any, error: type, words: str) -> None:
    data = {"name": "mine", "scorer": {"part": "key_norm"}, field: value}
    with pytest.raises(error, match=words):
        Recipe.from_plain(data)


@pytest.mark.parametrize("data", [{}, {"name": "mine"}, {"scorer": {"part": "key_norm"}}, [], None, "mine"])
def test_what_is_no_recipe_is_refused(data: Any) -> None:
    with pytest.raises(RecipeError, match="needs at least the keys 'name' and 'scorer'"):
        Recipe.from_plain(data)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recipe{suffix}"
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path)
    for content in (b"\xff\xfe\x00", b"{not a recipe", b"= 3"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="neither TOML nor JSON"):
            Recipe.load(path)
    path.write_bytes(b"")
    with pytest.raises(RecipeError):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Recipe("mine", KeyNorm(), reuse=0), "at least 1 layer"),
        (lambda: Recipe("mine", KeyNorm(), reuse=2, layers=EntropyLayers()), "reuse=2 copies one layer's choice"),
        (lambda: Recipe("mine", KeyNorm(), merge=MassFold()), "are no masses"),
        (lambda: Recipe("mine", KeyNorm(), unit=ChunkUnit(), heads=AdaptiveHeads()), "Set per_head on the unit"),
        (lambda: BUSY.with_options(unit=ChunkUnit(5)), "Set per_head on the unit"),
        (lambda: Protect(recent=-1), "recent=-1"),
        (lambda: Trigger(every=0), "every=0"),
    ],
)
def test_combinations_that_cannot_be_honoured_are_refused(build: Callable[[], object], words: str) -> None:
    with pytest.raises(KvthriftError, match=words):
        build()


def test_needs_are_those_of_all_parts_together() -> None:
    assert str(Recipe("mine", KeyNorm()).needs) == "keys and values only"
    assert str(method("streamingllm", rerotate=True).needs) == "rotary embedding"
    assert str(method("criticalkv").needs) == "last 32 queries, output projection"
    assert str(method("h2o").needs) == "attention column sums"
    assert method("expected_attention", sinks=7).needs.moments_after == 7
    assert method("cake", window=12).needs.window == 12


def test_recipes_compare_by_value() -> None:
    assert len({method("snapkv"), method("snapkv", window=32), method("snapkv", window=31)}) == 2
    assert method("snapkv", budget=512) == method("snapkv", budget="512")
    assert method("snapkv", budget=512) != method("snapkv", budget="512KiB")


def test_one_line_says_what_differs_from_the_defaults() -> None:
    assert str(method("full")) == "full: recency | budget=everything"
    line = str(method("adakv", budget="25%", every=16, skip=(0,)))
    for words in ("adakv: window_attention", "budget=25%", "heads=adaptive", "recent=32", "every=16", "skip=(0,)"):
        assert words in line
    assert "unit" not in line
    assert "\n" not in str(BUSY)


def test_the_table_has_a_row_for_every_question() -> None:
    rows = dict(BUSY.table())
    questions = set(Recipe.__dataclass_fields__) - {"name", "budget"} | {"keeps", "needs"}
    assert set(rows) == questions
    assert rows["keeps"] == "12.5%"
    assert dict(Recipe("mine", Recency()).table())["keeps"] == "everything"
    assert dict(Recipe("mine", Recency()).table())["refine"] == "none"
