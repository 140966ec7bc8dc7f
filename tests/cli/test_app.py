"""The command without a verb, and the list of verbs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

import kvthrift as package
from kvthrift.cli import main
from kvthrift.cli.app import VERBS
from kvthrift_command import main as command

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


LIGHT = """
import sys
from kvthrift_command import main
sys.argv = ["kvthrift", *sys.argv[1:]]
try:
    main()
except SystemExit as left:
    assert left.code == 0
heavy = {"torch", "transformers", "numpy", "kvthrift"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [(), ("--help",), ("--version",)])
def test_what_the_command_says_of_itself_takes_no_model_library(kvthrift: Run, words: tuple[str, ...]) -> None:
    wanted = kvthrift(*words)  # sets how wide and colourless output is, for both
    found = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == wanted.stdout


def test_a_verb_is_handed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kvthrift", "methods", "snapkv", "--json"])
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == 0
    assert '"snapkv"' in capsys.readouterr().out
