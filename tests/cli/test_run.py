"""What ``kvthrift run`` measures and prints when all goes well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from tests.cli.conftest import save_model
from typer.testing import Result

from kvthrift import Recipe, method

Run = Callable[..., Result]

ARM = {
    "answer",
    "tokens",
    "prefill_seconds",
    "compression_seconds",
    "tokens_per_second",
    "peak_bytes",
    "prefilled",
    "finished",
}
KEYS = {
    "model",
    "dtype",
    "device",
    "question",
    "question_hidden",
    "prompt_tokens",
    "context_tokens",
    "chunk",
    "max_new_tokens",
    "recipe",
    "versions",
    "entries_before",
    "entries_after",
    "bytes_before",
    "bytes_after",
    "agreement",
    "full",
    "compressed",
}


def measured(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_says_all_that_was_measured(ask: Run) -> None:
    found = measured(ask("--budget", 64, "--json"))
    assert set(found) == KEYS
    assert set(found["full"]) == set(found["compressed"]) == ARM
    assert found["recipe"] == method("snapkv", budget=64).plain()
    assert found["entries_before"] == 2 * 2 * found["prompt_tokens"]  # layers, heads
    assert found["entries_after"] == 2 * 2 * 64
    assert 0 < found["bytes_after"] < found["bytes_before"] / 4
    assert found["compressed"]["peak_bytes"] < found["full"]["peak_bytes"]
    assert found["compressed"]["compression_seconds"] > 0 == found["full"]["compression_seconds"]
    for arm in ("full", "compressed"):
        assert len(found[arm]["tokens"]) == 8
        assert found[arm]["prefill_seconds"] > 0 < found[arm]["tokens_per_second"]
        assert found[arm]["finished"]["tokens"] == [found["prompt_tokens"] + 7]
    agreement = found["agreement"]
    assert agreement["tokens"] == 8
    assert agreement["prefix"] <= 8 * agreement["share"] <= 8


@pytest.mark.parametrize("budget", ["1000", "100%", "64MiB"])
@pytest.mark.parametrize("more", [(), ("--hide-question",), ("--chunk", 100)])
def test_with_room_for_all_the_answers_are_the_same(ask: Run, budget: str, more: tuple[object, ...]) -> None:
    found = measured(ask("--budget", budget, "--json", *more))
    assert found["agreement"] == {"tokens": 8, "prefix": 8, "share": 1.0}
    assert found["full"]["answer"] == found["compressed"]["answer"]
    assert found["entries_before"] == found["entries_after"]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_neox"])
def test_other_architectures(ask: Run, tmp_path: Path, architecture: str) -> None:
    found = measured(ask("--model", save_model(tmp_path, architecture), "--budget", 64, "--json"))
    assert found["bytes_after"] < found["bytes_before"]


def test_a_hidden_question_is_not_compressed(ask: Run) -> None:
    found = measured(ask("--budget", 64, "--hide-question", "--json"))
    assert found["question_hidden"]
    around = len("why?[end][answer]")
    assert found["entries_after"] == 2 * 2 * (64 + around)


def test_chunks_bound_the_peak(ask: Run) -> None:
    whole, pieces = (
        measured(ask("--budget", 64, "--json", *more))["compressed"]["peak_bytes"] for more in ((), ("--chunk", 100))
    )
    assert pieces < whole


def test_quiet_prints_the_answer_alone(ask: Run) -> None:
    answer = measured(ask("--budget", 64, "--json"))["compressed"]["answer"]
    result = ask("--budget", 64, "--quiet")
    assert result.exit_code == 0
    assert result.stdout == answer + "\n"
    assert result.stderr == ""


def test_tables_fit_80_columns(ask: Run) -> None:
    result = ask("--budget", 64)
    assert result.exit_code == 0
    assert max(map(cell_len, result.stdout.split("\n"))) <= 80
    for words in ("full cache", "snapkv, budget 64", "entries held", "bytes held", "peak bytes", "tokens/s", "why?"):
        assert words in result.stdout
    assert result.stderr == ""


def test_progress_stays_on_stderr(ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    result = ask("--budget", 64, "--json")
    json.loads(result.stdout)
    for words in ("Loading the model", "Reading, snapkv", "Decoding, snapkv", "Reading, full cache"):
        assert words in result.stderr
    assert ask("--budget", 64, "--quiet").stderr == ""


def test_a_text_may_come_from_stdin(kvthrift: Run, ask: Run, model_folder: Path, text: Path) -> None:
    from_file = ask("--quiet")
    words = ("--context", "-", "--question", "why?", "--max-new-tokens", 8, "--page", 16, "--quiet")
    from_stdin = kvthrift("run", "--model", model_folder, *words, input=text.read_text(encoding="utf-8"))
    assert from_stdin.stdout == from_file.stdout != ""


def test_the_shipped_text_is_cut_to_what_the_model_reads(kvthrift: Run, model_folder: Path) -> None:
    found = measured(kvthrift("run", "--model", model_folder, "--budget", 64, "--max-new-tokens", 8, "--json"))
    assert 1000 < found["prompt_tokens"] + 8 <= 1024


def test_tokens_says_how_much_of_a_text_is_read(ask: Run) -> None:
    assert measured(ask("--tokens", 100, "--budget", 64, "--json"))["context_tokens"] == 100


def test_options_reach_the_method(ask: Run) -> None:
    found = measured(
        ask("-m", "streamingllm", "-o", "sinks=2", "--budget", 40, "--every", 4, "--merge", "evict", "--json")
    )
    assert found["recipe"] == method("streamingllm", budget=40, every=4, sinks=2).plain()


def test_the_full_cache_takes_no_budget_by_default(ask: Run) -> None:
    assert measured(ask("--method", "full", "--json"))["agreement"]["share"] == 1.0


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_saved_recipe_does_the_same_again(ask: Run, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"mine.{ending}"
    first = ask("-m", "keydiff", "--budget", "25%", "--quiet", "--save-recipe", file)
    assert first.exit_code == 0
    assert Recipe.load(file) == method("keydiff", budget="25%")
    assert ask("--recipe", file, "--quiet").stdout == first.stdout
    assert ask("--recipe", file, "--budget", 50, "--json").exit_code == 0


def test_a_saved_recipe_is_not_overwritten_without_force(ask: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("precious", encoding="utf-8")
    refused = ask("--save-recipe", file)
    assert refused.exit_code == 2
    assert "is there already" in refused.stderr
    assert file.read_text(encoding="utf-8") == "precious"
    assert ask("--save-recipe", file, "--force", "--quiet").exit_code == 0
    assert Recipe.load(file) == method("snapkv", budget=512)
