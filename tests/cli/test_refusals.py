"""Bad input: exit code 2, one sentence on stderr, nothing on stdout, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import save_model
from typer.testing import Result

Run = Callable[..., Result]

REFUSALS = {
    "unknown method": (("--method", "snapkvv"), "unknown method 'snapkvv'. Did you mean 'snapkv'? Valid: adakv,"),
    "unknown option": (("-o", "windw=8"), "unknown option of method snapkv: 'windw'. Did you mean 'window'?"),
    "option without a value": (("-o", "window"), "--option 'window' has no value"),
    "option given twice": (("-o", "window=8", "-o", "window=9"), "--option window is given twice"),
    "option and flag": (("-o", "budget=8", "--budget", "9"), "--budget and --option budget say the same thing"),
    "option of the wrong type": (("-o", "window=wide"), "option window='wide' is not of type int"),
    "option out of range": (("-o", "kernel=4"), "kernel=4 must be odd"),
    "option that is no choice": (("-o", "pool=sum"), "Valid: max, avg, none"),
    "option that is an argument": (("-o", "name=x"), "unknown option of method snapkv: 'name'"),
    "unknown merger": (("--merge", "glue"), "unknown merge 'glue'. Valid: "),
    "unknown model": (("--model", "./nowhere"), "there is no folder './nowhere'"),
    "unknown number type": (("--dtype", "int8"), "dtype 'int8' is not a floating-point type"),
    "unknown device": (("--device", "abacus"), "device 'abacus' cannot be used here"),
    "budget 0": (("--budget", "0"), "budget 0 would leave nothing in the cache"),
    "budget below 0": (("--budget", "-5"), "budget -5 would leave nothing in the cache"),
    "budget 0%": (("--budget", "0%"), "budget 0% would leave nothing in the cache"),
    "budget 101%": (("--budget", "101%"), "budget 101% is more than the whole prompt"),
    "budget in apples": (("--budget", "3apples"), "budget '3apples' has the unknown unit 'apples'"),
    "budget below the window": (("--budget", "8"), "snapkv always keeps 0 sinks and 32 recent entries"),
    "share below the window": (("--budget", "1%"), "snapkv always keeps 0 sinks and 32 recent entries"),
    "bytes for less than an entry a head": (("--budget", "100B"), "budget 100B is too few bytes for 4 heads"),
    "full with a budget": (("--method", "full", "--budget", "9"), "method 'full' keeps everything"),
    "recipe that is missing": (("--recipe", "gone.toml"), "recipe file gone.toml cannot be read"),
    "recipe and method": (
        ("--recipe", "x.toml", "-m", "tova", "--every", "2"),
        "--method and --every would contradict",
    ),
    "context that is missing": (("--context", "gone.txt"), "context file 'gone.txt' cannot be read"),
    "context that is a folder": (("--context", "."), "context file '.' cannot be read (Is a directory)"),
    "window wider than the text": (("-o", "window=700", "--budget", "800"), "fewer than the window of 700 newest"),
    "answer longer than the model": (("--max-new-tokens", "2000"), "the model reads at most 1024"),
    "empty question": (("--question", " "), "the question is empty"),
    "place to save in no folder": (("--save-recipe", "no/such/mine.toml"), "lies in a folder that does not exist"),
    "place to save that is a folder": (("--save-recipe", "."), "'.' is a folder"),
}


@pytest.mark.parametrize(("words", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_in_a_sentence(ask: Run, words: tuple[str, ...], sentence: str) -> None:
    refused(ask(*words), sentence)


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


@pytest.mark.parametrize(
    "words", [("--tokens", 0), ("--every", 0), ("--chunk", 1), ("--max-new-tokens", 0), ("--wat",)]
)
def test_what_typer_refuses_is_exit_code_2_too(ask: Run, words: tuple[object, ...]) -> None:
    assert ask(*words).exit_code == 2


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_context_is_refused(ask: Run, text: Path, content: str) -> None:
    text.write_text(content, encoding="utf-8")
    refused(ask(), "the context is empty")


def test_a_context_shorter_than_the_window_is_refused(ask: Run, text: Path) -> None:
    text.write_text("a few words", encoding="utf-8")
    refused(ask("--budget", 64), "the context has 11 tokens, fewer than the window of 32 newest queries")


def test_a_context_longer_than_the_model_reads_is_refused(ask: Run, text: Path) -> None:
    text.write_text("word " * 300, encoding="utf-8")
    result = ask()
    refused(result, "the model reads at most 1024; beyond that its positions mean nothing. Give --tokens 99")
    room = result.stderr.split("--tokens ")[1].split()[0]
    assert ask("--tokens", room, "--quiet").exit_code == 0


def test_a_context_that_is_not_text_is_refused(ask: Run, text: Path) -> None:
    text.write_bytes(b"abc\xff\xfe")
    refused(ask(), "is not UTF-8 text (byte 3)")


def test_a_model_that_cannot_be_compressed_is_refused(ask: Run, tmp_path: Path) -> None:
    refused(ask("--model", save_model(tmp_path, "deepseek_v3")), "deepseek_v3")


def test_a_recipe_that_is_none_is_refused(ask: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("name = 'x'", encoding="utf-8")
    refused(ask("--recipe", file), "a recipe needs at least the keys")


def test_a_refused_run_leaves_nothing_behind(ask: Run, tmp_path: Path, text: Path) -> None:
    refused(ask("--budget", "100B", "--save-recipe", tmp_path / "mine.toml"), "too few bytes")
    assert list(tmp_path.iterdir()) == [text]


def test_debug_shows_where_an_error_came_from(ask: Run) -> None:
    result = ask("--budget", "0", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: budget 0 ")


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (
            RuntimeError("the sky\nfell"),
            1,
            "error: RuntimeError: the sky fell (not foreseen; run again with --debug)\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted.\n"),
    ],
)
def test_the_unforeseen(
    ask: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, sentence: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("kvthrift.cli.run.load_model", fail)
    result = ask()
    assert (result.exit_code, result.stderr, result.stdout) == (code, sentence, "")
