"""What ``kvthrift methods`` lists and explains."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from typer.testing import Result

from kvthrift import methods

Run = Callable[..., Result]


def test_every_method_is_listed(kvthrift: Run) -> None:
    result = kvthrift("methods")
    assert result.exit_code == 0
    assert max(map(cell_len, result.stdout.split("\n"))) <= 80
    words = result.stdout.split()
    for name, method in methods().items():
        assert name in words
        assert method.paper in result.stdout
        assert method.title in result.stdout


def test_json_lists_them_too(kvthrift: Run) -> None:
    found = json.loads(kvthrift("methods", "--json").stdout)
    assert [entry["name"] for entry in found] == list(methods())
    assert all(entry["summary"] and entry["needs"] and "options" in entry for entry in found)


@pytest.mark.parametrize("name", methods())
def test_one_method_is_explained(kvthrift: Run, name: str) -> None:
    result = kvthrift("methods", name)
    assert result.exit_code == 0
    assert max(map(cell_len, result.stdout.split("\n"))) <= 80
    assert methods()[name].title in result.stdout
    assert f"kvthrift run --method {name}" in result.stdout
    words = result.stdout.split()
    for option in [x.name for x in methods()[name].options] + ([] if name == "full" else ["budget", "skip"]):
        assert option in words


@pytest.mark.parametrize("name", methods())
def test_json_explains_one(kvthrift: Run, name: str) -> None:
    found = json.loads(kvthrift("methods", name, "--json").stdout)
    assert found["name"] == name
    assert {option["name"] for option in found["options"]} >= {x.name for x in methods()[name].options}
    assert all(option["help"] for option in found["options"])


def test_an_unknown_method_is_refused(kvthrift: Run) -> None:
    result = kvthrift("methods", "h20")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "unknown method 'h20'. Did you mean 'h2o'?" in result.stderr


def test_the_example_of_a_method_that_keeps_the_prompt_has_room_for_one(kvthrift: Run) -> None:
    assert "--method triattention --budget 8192" in kvthrift("methods", "triattention").stdout
    assert "--method snapkv --budget 25%" in kvthrift("methods", "snapkv").stdout
