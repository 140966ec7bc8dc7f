"""Every option of every method: documented, read from text, and refused by name where its value is absurd."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import pytest
import torch
from tests.fitted import fitted
from tests.views import layer_view, with_signals

from kvthrift import KvthriftError, OptionError, Recipe, UnknownNameError, method, methods
from kvthrift.runtime.compress import choose, protected_entries

OPTIONS = [(m.name, option) for m in methods().values() for option in m.options]
IDS = [f"{name}-{option.name}" for name, option in OPTIONS]
COMMON = ("budget", "every", "merge", "skip", "codec")


def hint(name: str, option: str) -> Any:
    return typing.get_type_hints(methods()[name].build)[option]


def takes(name: str, option: str, kind: type) -> bool:
    found = hint(name, option)
    return found is kind or kind in typing.get_args(found)


@pytest.mark.parametrize("name", methods())
def test_a_method_says_what_it_is(name: str) -> None:
    found = methods()[name]
    assert found.name == name
    assert found.title
    assert found.summary.endswith((".", ";", ":")) or "." in found.summary
    assert len(found.summary) > 15
    assert "Args" not in found.text
    assert found.text.startswith(found.summary[:20])
    assert re.fullmatch(r"\d{4}\.\d{4,5}", found.paper) or name in ("full", "random")
    if found.paper:
        assert found.paper in (inspect.getdoc(inspect.getmodule(found.build)) or "")


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=IDS)
def test_an_option_is_documented(name: str, option: Any) -> None:
    assert len(option.help) > 10, f"{name}.{option.name} has no line under Args"
    assert option.type
    assert option.default is not inspect.Parameter.empty, "a method must work with no options at all"
    assert option.name not in COMMON


@pytest.mark.parametrize("name", methods())
def test_no_line_of_help_belongs_to_an_option_that_is_gone(name: str) -> None:
    doc = (inspect.getdoc(methods()[name].build) or "").partition("Args:")[2]
    documented = set(re.findall(r"^    (\w+): ", doc, re.MULTILINE))
    assert documented == {option.name for option in methods()[name].options}


@pytest.mark.parametrize("name", methods())
def test_an_unknown_option_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"option of method {name}: 'nonsense'") as error:
        method(name, nonsense=1)
    listed = str(error.value).partition("Valid: ")[2].rstrip(".").split(", ")
    assert set(listed) == {option.name for option in methods()[name].options} | set(COMMON)


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=IDS)
def test_an_option_is_read_from_text(name: str, option: Any) -> None:
    text = str(option.default)
    assert method(name, **{option.name: text}) == method(name)


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=IDS)
def test_an_option_of_another_type_is_refused_by_name(name: str, option: Any) -> None:
    names_something = takes(name, option.name, str)  # a method or a file
    with pytest.raises(KvthriftError if names_something else OptionError, match="nonsense"):
        method(name, **{option.name: "nonsense"})


def runs(recipe: Recipe) -> None:
    """The recipe's parts run on a layer and keep what they should."""
    per_head = recipe.protect.entries + 12
    window = max(recipe.needs.window, 1)
    plain = layer_view(heads=2, group=2, entries=per_head + 40, window=window, layers=2)
    view = with_signals(plain, needs=recipe.needs)
    scores = recipe.scorer.score(view).float()
    assert scores.isfinite().all()
    mean = torch.tensor([per_head])
    if recipe.layers.scope == "model":
        assert recipe.layers.weight(view, scores).isfinite().all()
        totals = mean
    elif recipe.layers.decides:
        totals = recipe.layers.stop(view, scores, protected_entries(recipe, view)).clamp(max=per_head)
    elif recipe.layers.scope == "joint":
        protected = protected_entries(recipe, view)
        totals = recipe.layers.share([scores.masked_fill(protected, float("inf"))], mean)[0]
    else:
        totals = recipe.layers.total(view, mean, recipe.protect.entries)
    keep = choose(recipe, view, scores, totals)
    assert int(keep.sum(dim=-1).min()) >= 1
    assert int(keep.sum()) <= (2 * int(totals) if totals.ndim == 1 else int(totals.sum()))


NUMBERS = [(n, o) for n, o in OPTIONS if takes(n, o.name, int) or takes(n, o.name, float)]


@pytest.mark.parametrize("value", [-1, 0, 1, float("nan")])
@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=[f"{n}-{o.name}" for n, o in NUMBERS])
def test_an_absurd_number_is_refused_or_honoured_and_never_a_crash(name: str, option: Any, value: float) -> None:
    try:
        recipe = method(name, **{option.name: value})
    except OptionError as error:
        if str(value) not in str(error):
            raise
        return
    assert value == value, "nan is no option's value"
    if value < 0:
        assert option.name in ("seed", "threshold"), "nothing but a seed or a logarithm may be negative"
    runs(fitted(recipe, dim=8))


@pytest.mark.parametrize("name", [n for n in methods() if n != "full"])
def test_a_method_runs_with_its_defaults(name: str) -> None:
    runs(fitted(method(name, budget=64), dim=8))
