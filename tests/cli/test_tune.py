"""``kvthrift tune``: what it prints and writes, that other verbs take it, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from kvthrift import Recipe, method
from kvthrift.allocate import PoolLayers
from kvthrift.eval.folder import read_run
from kvthrift.eval.rows import read_rows
from kvthrift.tune.search import Search

Run = Callable[..., Result]

SMALL = (
    "--method", "snapkv", "-o", "window=8", "--budget", "64", "--tasks", "niah.number", "--task-option",
    "haystack=filler", "--length", "500", "--samples", "2", "--max-new-tokens", "6", "--page", "16", "--trials", "6",
)  # fmt: skip


@pytest.fixture
def tune(kvthrift: Run, model_folder: Path, tmp_path: Path) -> Run:
    """``kvthrift tune`` on the tiny model, into ``tmp_path / "study"``."""

    def run(*words: object) -> Result:
        return kvthrift("tune", "--model", model_folder, "--out", tmp_path / "study", *SMALL, *words)

    return run


def test_the_result_is_a_recipe_that_other_verbs_take(
    tune: Run, kvthrift: Run, ask: Run, model_folder: Path, tmp_path: Path
) -> None:
    result = tune("--objective", "agreement")
    assert result.exit_code == 0, result.stderr
    best = tmp_path / "study" / "best.toml"
    assert result.stdout.strip() == str(best)
    for said in ("trial 0: agreement", "full cache  agreement 100.0%", "at first", "best   ", "measured on 2 prompts"):
        assert said in result.stderr
    page = (tmp_path / "study" / "page.html").read_text(encoding="utf-8")
    assert "watch it in a browser" in result.stderr
    assert "All 6 trials" in page
    assert 'http-equiv="refresh"' not in page
    recipe = Recipe.load(best)
    assert len(recipe.layers.entries) == 2
    assert sum(recipe.layers.entries) <= 2 * 64
    assert ask("--recipe", best).exit_code == 0
    words = ("--methods", "snapkv", "-o", "snapkv.window=8", "--budgets", "64", "--tasks", "niah.number", *SMALL[8:12])
    more = ("--samples", "1", "--max-new-tokens", "4", "--recipes", best, "--out", tmp_path / "run")
    found = kvthrift("eval", "--model", model_folder, *words, *more)
    assert found.exit_code == 0, found.stderr
    arms = {arm.name for arm in read_run(tmp_path / "run").arms}
    assert {"snapkv@64", f"snapkv-tuned@{recipe.budget}"} <= arms
    used = kvthrift(
        "run", "--model", model_folder, "-m", "evolkv", "-o", f"table={best}", "-o", "window=8", "-b", "64",
        "--context", tmp_path / "text.txt", "--question", "why?", "--max-new-tokens", "2", "--quiet",
    )  # fmt: skip
    assert used.exit_code == 0, used.stderr


def test_the_same_command_goes_on_and_another_is_refused(tune: Run, tmp_path: Path) -> None:
    words = ("--objective", "agreement,bytes", "--engine", "optuna", "--vary", "options", "--vary", "layers")
    assert tune(*words).exit_code == 0
    count = len(read_rows(tmp_path / "study" / "trials.jsonl"))
    again = tune(*words)
    assert again.exit_code == 0
    assert len(read_rows(tmp_path / "study" / "trials.jsonl")) == count
    assert list((tmp_path / "study" / "front").iterdir())
    other = tune(*words, "--seed", "1")
    assert other.exit_code == 2
    assert "holds another study (it differs in grid, seed)" in other.stderr


def test_ctrl_c_keeps_what_there_is(tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = Search._known, [0]

    def interrupted(*args: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return plain(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_known", interrupted)
        result = tune("--objective", "agreement", "--group", "2")
    assert result.exit_code == 130
    assert "interrupted: 3 trials are kept; the same command goes on from there." in result.stderr
    assert Recipe.load(tmp_path / "study" / "best.toml")
    assert tune("--objective", "agreement", "--group", "2").exit_code == 0
    assert len(read_rows(tmp_path / "study" / "trials.jsonl")) > 3


REFUSALS = {
    "nothing to tune": (("--vary", "layers", "-m", "pyramidkv"), "decides budgets by layer itself"),
    "below the floor": (("--budget", "4"), "snapkv always keeps 0 sinks and 8 recent entries"),
    "above the prompt": (("--budget", "5000"), "nothing goes and every recipe is the same"),
    "bytes for too little": (("--budget", "100B"), "budget 100B is too few bytes"),
    "engine": (("--engine", "swarm"), "--engine 'swarm' is not one there is. Valid: cma, optuna"),
    "objective": (("--objective", "speed"), "objective 'speed' is not one there is"),
    "two values": (("--objective", "score,bytes"), "has two values, and cma takes one"),
    "floor": (("--floor", "1.5"), "floor=1.5 must lie above 0"),
    "task": (("--tasks", "niah.needle"), "unknown task 'niah.needle'"),
    "option": (("--vary", "scorer.kernels"), "unknown numeric option 'scorer.kernels'"),
    "too few trials": (("--trials", "2"), "trials=2 is too few"),
    "too long": (("--length", "100000"), "the model reads at most 1024"),
}


NOTHING = {
    "no budget": (method("snapkv"), "recipe snapkv has no budget, so there is nothing to tune. Give --budget."),
    "finds its own": (method("dbudgetkv"), "recipe dbudgetkv has no budget, so there is nothing to tune"),
    "its own layers": (
        method("knorm", budget=64).with_options(layers=PoolLayers()),
        "recipe knorm decides budgets by layer itself (layers=pool), so there are none to search",
    ),
    "keeps everything": (None, "method 'full' keeps everything and takes no budget"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_tune_is_said(name: str, kvthrift: Run, model_folder: Path, tmp_path: Path) -> None:
    recipe, said = NOTHING[name]
    words: tuple[object, ...] = ("--method", "full", "--budget", "64")
    if recipe is not None:
        recipe.save(tmp_path / "recipe.toml")
        words = ("--recipe", tmp_path / "recipe.toml")
    rest = tuple(word for word in SMALL[4:] if word not in ("--budget", "64"))
    result = kvthrift("tune", "--model", model_folder, "--out", tmp_path / "study", *rest, *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "study" / "best.toml").exists()


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_said_in_a_sentence_and_leaves_nothing(name: str, tune: Run, tmp_path: Path) -> None:
    words, said = REFUSALS[name]
    result = tune(*words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "study" / "best.toml").exists()
