"""The contract of parts: names and options are checked, values are read from text, and plain data comes back."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from kvthrift import OptionError, RecipeError, UnknownNameError
from kvthrift.allocate import AdaptiveHeads, HeadAllocator, TableHeads, UniformHeads
from kvthrift.part import Part, convert, named, parts
from kvthrift.score import AttentionReceived, KeyNorm, Scorer, WindowAttention
from kvthrift.select import OutputAware, Refiner


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, int, 3),
        ("3", int, 3),
        (3.0, int, 3),
        ("0.5", float, 0.5),
        (1, float, 1.0),
        ("text", str, "text"),
        (True, bool, True),
        ("yes", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        (None, int | None, None),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("sum", Literal["mean", "sum"], "sum"),
        ("none", Literal["max", "none"], "none"),
        ("1,-2,3", tuple[int, ...], (1, -2, 3)),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((), tuple[int, ...], ()),
        ([[1, 2], [3, 4]], tuple[tuple[float, ...], ...], ((1.0, 2.0), (3.0, 4.0))),
        ({"part": "key_norm"}, Scorer, KeyNorm()),
        (KeyNorm(), Scorer, KeyNorm()),
    ],
)
def test_values_are_read_as_their_type(value: Any, hint: Any, result: Any) -> None:
    found = convert("here", value, hint)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("3.5", int),
        (3.5, int),
        (float("inf"), int),
        (float("nan"), int),
        ("", int),
        (True, int),
        (True, float),
        ("abc", float),
        ([1], float),
        (None, int),
        ({}, int),
        (2, bool),
        ("maybe", bool),
        (None, bool),
        ("median", Literal["mean", "sum"]),
        (None, Literal["mean", "sum"]),
        ([], Literal["mean", "sum"]),
        ("x", int | None),
        (True, int | None),
        ("1,x", tuple[int, ...]),
        ("", tuple[int, ...]),
        (5, tuple[int, ...]),
        ([1.5], tuple[int, ...]),
        ([1, 2], tuple[tuple[float, ...], ...]),
    ],
)
def test_values_of_another_type_are_refused_by_name(value: Any, hint: Any) -> None:
    with pytest.raises(OptionError, match="here"):
        convert("here", value, hint)


def test_a_choice_that_is_not_valid_lists_those_that_are() -> None:
    with pytest.raises(OptionError, match=r"pool='median' is not valid. Valid: max, avg, none"):
        WindowAttention.build({"pool": "median"})


PARTS = sorted(
    (kind, name) for kind, found in parts().items() for name, part in found.items() if part.__module__[:8] == "kvthrift"
)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_part_of_defaults_is_its_name_and_comes_back(kind: str, name: str) -> None:
    part = parts()[kind][name]()
    assert part.plain() == {"part": name}
    assert str(part).startswith(name)
    back = part.from_plain(part.plain())
    assert back == part
    assert hash(back) == hash(part)
    assert type(back) is type(part)


@pytest.mark.parametrize(
    "part",
    [
        WindowAttention(8, "sum", "avg", 5, "max", pool_first=False, variance=200.0, value_scale=True),
        AttentionReceived("rows"),
        AdaptiveHeads(0.3, 0.5),
        TableHeads(((0.1, 0.2), (0.3, 0.4)), 1.1, 8),
        OutputAware(0.25, 0.0, False),
    ],
    ids=lambda p: p.name,
)
def test_options_that_differ_from_their_defaults_come_back(part: Part) -> None:
    plain = part.plain()
    assert len(plain) > 1
    kind = next(base for base in type(part).__mro__ if Part in base.__bases__)
    assert kind.from_plain(plain) == part  # type: ignore[attr-defined]
    for key in plain.keys() - {"part"}:
        fewer = {k: v for k, v in plain.items() if k != key}
        assert kind.from_plain(fewer) != part  # type: ignore[attr-defined]


def test_an_unknown_part_lists_those_of_its_kind() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown heads 'adaptiv'. Did you mean 'adaptive'\? Valid: adaptive, "):
        HeadAllocator.from_plain({"part": "adaptiv"})
    with pytest.raises(UnknownNameError, match="unknown scorer 'uniform'"):
        named("scorer", "uniform")
    with pytest.raises(UnknownNameError):
        Refiner.from_plain({"part": "evict"})  # a merger is no refiner


def test_an_unknown_option_lists_those_of_the_part() -> None:
    with pytest.raises(UnknownNameError, match=r"option of heads adaptive: 'safegard'.*Valid: blend, safeguard"):
        AdaptiveHeads.build({"safegard": 0.1})
    with pytest.raises(UnknownNameError, match="Valid: "):
        UniformHeads.from_plain({"part": "uniform", "beta": 2})


@pytest.mark.parametrize("data", [None, "adaptive", {}, {"part": 3}, {"name": "adaptive"}, ["adaptive"]])
def test_what_is_no_table_of_a_part_is_refused(data: Any) -> None:
    with pytest.raises(RecipeError, match="must be a table with the key 'part'"):
        HeadAllocator.from_plain(data)


def test_options_out_of_range_are_refused_when_read_too() -> None:
    with pytest.raises(OptionError, match="safeguard"):
        AdaptiveHeads.build({"safeguard": "1.5"})
    with pytest.raises(OptionError, match=r"window_attention\.window='many'"):
        WindowAttention.build({"window": "many"})


def test_parts_of_one_kind_and_options_compare_equal_and_others_do_not() -> None:
    assert len({AdaptiveHeads(), AdaptiveHeads(0.2), AdaptiveHeads(0.3), UniformHeads()}) == 3
    assert KeyNorm() != AttentionReceived()


def test_the_registry_handed_out_is_a_copy() -> None:
    found = parts()
    found["scorer"].clear()
    assert "key_norm" in parts()["scorer"]


def test_a_part_in_words_shows_what_was_chosen() -> None:
    assert str(WindowAttention(8, pool="none")) == "window_attention(window=8, pool=none)"
    assert str(KeyNorm()) == "key_norm"
