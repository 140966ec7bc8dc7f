"""``kvthrift serve``: what it says before it starts a server, and the command it would start."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import save_model
from typer.testing import Result

from kvthrift.cli import serve as command_line
from kvthrift.errors import UnsupportedModelError

Run = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(command_line, "check_served", lambda: "cpu")
    monkeypatch.setattr(command_line, "installed", lambda: "0.32.0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return str(save_model(tmp_path / "model", "llama"))


def test_it_says_what_is_compressed_and_how_many_decode_at_a_time(model: str, kvthrift: Run) -> None:
    words = ("--method", "snapkv", "--budget", "256", "--block-size", "32", "--num-gpu-blocks-override", "640")
    done = kvthrift("serve", model, *words, "--dry-run")
    assert done.exit_code == 0, done.stderr
    first, *forecasts, command = done.output.splitlines()
    assert first == ("kvthrift in vLLM 0.32.0: snapkv, 256 entries a head, in whole blocks, at the end of a prompt")
    assert forecasts[0].strip() == (
        "a prompt of 2,048 tokens keeps 8 of 64 blocks of 32: 8.0 times as many decode in the same memory, about 80 at "
        "a time instead of 10"
    )
    given = shlex.split(command)
    extra = json.loads(given[given.index("--additional-config") + 1])
    assert extra["kvthrift"]["recipe"]["budget"] == "256"
    assert given[-4:] == list(words[-4:])


def test_without_vllm_it_says_so(model: str, kvthrift: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise UnsupportedModelError("vLLM is not installed.")

    monkeypatch.setattr(command_line, "check_served", refuse)
    done = kvthrift("serve", model, "--method", "snapkv", "--budget", "256")
    assert done.exit_code == 2
    assert "vLLM is not installed" in done.stderr
