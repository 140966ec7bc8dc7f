"""A name and its options make a recipe; every file of a method is listed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kvthrift import BudgetError, OptionError, Protect, RecipeError, UnknownNameError, method, methods
from kvthrift.merge import Evict, MassFold

ALL = list(methods())


def test_every_file_of_a_method_is_listed_and_holds_the_method_of_its_name() -> None:
    package = import_module("kvthrift.methods")
    files = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__", "registry"}
    assert set(package._FILES) == files
    assert set(ALL) == files
    assert sorted(ALL) == ALL


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_carries_its_methods_name(name: str) -> None:
    assert method(name).name == name
    assert method(name).budget is None


PROTECTED = {
    "adakv": Protect(0, 32),
    "cake": Protect(0, 32),
    "chunkkv": Protect(0, 8),
    "compresskv": Protect(0, 8),
    "criticalkv": Protect(0, 32),
    "dbudgetkv": Protect(4, 0),
    "evolkv": Protect(0, 32),
    "expected_attention": Protect(4, 0),
    "full": Protect(0, 0),
    "h2o": Protect(0, 32),
    "headkv": Protect(0, 32),
    "keydiff": Protect(0, 0),
    "knorm": Protect(0, 0),
    "kv_compress": Protect(0, 8),
    "kvcompose": Protect(0, 0),
    "kvzip": Protect(4, 0),
    "lagkv": Protect(4, 0),
    "lava": Protect(0, 32),
    "pyramidkv": Protect(0, 8),
    "random": Protect(4, 32),
    "sablock": Protect(0, 8),
    "snapkv": Protect(0, 32),
    "streamingllm": Protect(4, 0),
    "task_kv": Protect(0, 0),
    "tova": Protect(0, 1),
    "triattention": Protect(0, 0),
    "uncomp": Protect(0, 8),
}


@pytest.mark.parametrize(("name", "wanted"), PROTECTED.items())
def test_a_method_protects_what_its_paper_does(name: str, wanted: Protect) -> None:
    assert method(name).protect == wanted


WINDOWED = ["adakv", "cake", "chunkkv", "compresskv", "h2o", "headkv", "lava", "pyramidkv", "sablock", "snapkv"]
WINDOWED += ["evolkv", "uncomp"]


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_asked_is_the_window_kept(name: str) -> None:
    option = {"adakv": {}, "h2o": {"recent": 17}}.get(name, {"window": 17})
    recipe = method(name, **option)
    assert recipe.protect.recent == (recipe.needs.window or 17)
    assert recipe.protect.recent == (17 if option else 32)


def test_an_unknown_method_lists_all() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'snapvk'. Did you mean 'snapkv'\?") as error:
        method("snapvk")
    assert all(name in str(error.value) for name in ALL)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, OptionError, "every=0"),
        ({"every": -3}, OptionError, "every=-3"),
        ({"every": "often"}, OptionError, "every='often'"),
        ({"every": 1.5}, OptionError, "every=1.5"),
        ({"skip": "first"}, OptionError, "skip='first'"),
        ({"skip": ""}, OptionError, "skip=''"),
        ({"merge": "glue"}, UnknownNameError, "unknown merge 'glue'.*Valid: evict, fold"),
        ({"budget": "101%"}, BudgetError, "more than the whole"),
        ({"budget": True}, BudgetError, "no unit"),
    ],
)
def test_common_options_are_checked(options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        method("snapkv", **options)


def test_common_options_are_read() -> None:
    recipe = method("snapkv", budget="512", every="16", merge="fold", skip="0,-1")
    assert str(recipe.budget) == "512"
    assert recipe.trigger.every == 16
    assert recipe.merge == MassFold()
    assert recipe.skip == (0, -1)
    assert method("snapkv", merge="evict").merge == Evict()
    assert method("tova", decode=True).trigger.every == 1
    assert method("tova", decode=True, every="none").trigger.every is None
    assert method("tova", decode=True, every=4).trigger.every == 4


def test_the_full_cache_takes_no_budget() -> None:
    with pytest.raises(RecipeError, match="takes no budget"):
        method("full", budget=512)


@pytest.mark.parametrize("name", ["knorm", "keydiff", "lagkv", "streamingllm", "random"])
def test_scores_that_are_no_masses_cannot_be_folded(name: str) -> None:
    with pytest.raises(RecipeError, match="are no masses"):
        method(name, merge="fold")


@pytest.mark.parametrize("wrapper", ["adakv", "criticalkv"])
def test_a_wrapper_does_not_wrap_itself_nor_what_is_not_there(wrapper: str) -> None:
    with pytest.raises(RecipeError, match=f"{wrapper} cannot wrap itself"):
        method(wrapper, base=wrapper)
    with pytest.raises(UnknownNameError, match="unknown method 'nonsense'"):
        method(wrapper, base="nonsense")


def test_wrappers_refuse_bases_they_cannot_honour() -> None:
    with pytest.raises(RecipeError, match="means nothing for key_norm scores"):
        method("criticalkv", base="knorm")
    with pytest.raises(RecipeError, match="keeps the same groups in all heads"):
        method("adakv", base="chunkkv")


@pytest.mark.parametrize("base", ["snapkv", "h2o", "expected_attention", "pyramidkv", "cake"])
def test_wrappers_keep_everything_of_their_base_but_what_they_add(base: str) -> None:
    plain = method(base)
    over = method("adakv", base=base)
    assert over.with_options(name=base, heads=plain.heads) == plain
    critical = method("criticalkv", base=base)
    assert critical.with_options(name=base, refine=None) == plain
    assert critical.refine is not None


def test_wrappers_stack_in_either_order() -> None:
    one, other = method("criticalkv", base="adakv"), method("adakv", base="criticalkv")
    assert one.with_options(name="x") == other.with_options(name="x")
