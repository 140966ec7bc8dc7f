"""The command without a verb, and the list of verbs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import Result

import kvthrift as package
from kvthrift.cli import main
from kvthrift.cli.app import VERBS

Run = Callable[..., Result]


def test_the_version(kvthrift: Run) -> None:
    result = kvthrift("--version")
    assert (result.exit_code, result.stdout) == (0, f"kvthrift {package.__version__}\n")


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_lists_the_verbs(kvthrift: Run, words: tuple[str, ...]) -> None:
    result = kvthrift(*words)
    assert result.exit_code == 0
    for verb in VERBS:
        assert f" {verb} " in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(kvthrift: Run, verb: str) -> None:
    assert kvthrift(verb, "--help").exit_code == 0


def test_an_unknown_verb_is_refused(kvthrift: Run) -> None:
    assert kvthrift("fly").exit_code == 2


def test_the_entry_point_is_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kvthrift", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert package.__version__ in capsys.readouterr().out
