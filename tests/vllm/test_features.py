"""Beside vLLM's other features: several answers, aborts, preemption, structured output, shared beginnings, LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import save_file
from tests.vllm.running import engine, start

from kvthrift.integrations.transformers.embedded import embedded_path
from kvthrift.integrations.vllm.plan import Policy, untouched

BLOCK = 32
ONCE = {"budget": 256, "check": True}
OFTEN = {"budget": 256, "every": 16, "check": True}
METHODS = {"snapkv": {"method": "snapkv", **OFTEN}, "adakv": {"method": "adakv", **ONCE}}
ROUNDS: list[dict[str, Any]] = [
    {"requests": 2},
    {"requests": 2},
    {"requests": 2, "n": 3, "tokens": 40},
    {"requests": 3, "tokens": 40, "abort": [[0, "prompt"], [1, "answer"]]},
    {"requests": 2, "choice": ["7300", "7317", "elephant"]},
    {"requests": 2, "regex": "[0-9]{4}", "tokens": 12},
    {"requests": 4, "fill": 8},
    {"requests": 9, "fill": 8, "tokens": 60},
]

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", params=METHODS)
def found(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """One engine for all of it; its pool holds one prompt while it is read, and a few compressed ones."""
    name: str = request.param
    asked = {"rounds": ROUNDS, "prefix": True, "batched": 512, "blocks": 70, "kvthrift": METHODS[name]}
    return name, engine(**asked)


def test_the_pool_is_whole_after_each(found: tuple[str, list[dict[str, Any]]]) -> None:
    assert [one["left"] for one in found[1]] == [0] * len(ROUNDS)


def test_a_shared_beginning_is_reused_as_far_as_it_is_never_written_over(
    found: tuple[str, list[dict[str, Any]]],
) -> None:
    name, (first, second, *_) = found
    policy = Policy(entries=256, least=32, every=METHODS[name].get("every"))
    assert first["cached"][0] == 0
    for prompt, cached in zip(second["prompt"], second["cached"], strict=True):  # the pool is too small to keep it all
        assert 0 < cached <= (untouched(prompt, BLOCK, policy) or 0) * BLOCK
        assert cached % BLOCK == 0
    assert all(first["right"] + second["right"])


def test_several_answers_to_a_prompt(found: tuple[str, list[dict[str, Any]]]) -> None:
    several = found[1][2]
    assert [len(texts) for texts in several["texts"]] == [3, 3]
    assert (
        sum(key in text for key, texts in zip(("7300", "7317"), several["texts"], strict=True) for text in texts) >= 4
    )


def test_aborts_leave_nothing_behind(found: tuple[str, list[dict[str, Any]]]) -> None:
    aborted = found[1][3]
    assert aborted["unreached"] == []  # each was caught where it was to be
    assert aborted["right"] == [True]
    assert aborted["left"] == 0


def test_structured_answers(found: tuple[str, list[dict[str, Any]]]) -> None:
    choice, regex = found[1][4], found[1][5]
    assert [texts[0] for texts in choice["texts"]] == ["7300", "7317"]
    assert all(re.fullmatch("[0-9]{4}", texts[0]) for texts in regex["texts"])
    assert all(regex["right"])


def test_preempted_requests_are_read_anew_and_right(found: tuple[str, list[dict[str, Any]]]) -> None:
    calm, scarce = found[1][6:]
    assert calm["preempted"] == 0
    assert scarce["preempted"] >= 1
    assert any(calm["right"])
    assert scarce["right"][:4] == calm["right"]


def _adapter(folder: Path, strength: float) -> Path:
    """A LoRA of rank 4 on the query projections."""
    torch.manual_seed(0)
    config = json.loads((embedded_path() / "config.json").read_text())
    width = config["hidden_size"]
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = strength * torch.randn(4, width)
        weights[f"{name}.lora_B.weight"] = strength * torch.randn(width, 4)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_adapters_share_no_beginnings_with_the_model(tmp_path: Path) -> None:
    mild, wild = (str(_adapter(tmp_path / name, size)) for name, size in (("mild", 1e-3), ("wild", 0.5)))
    rounds = [{"requests": 2}, {"requests": 2, "lora": mild}]
    first, second = engine(rounds=rounds, lora=True, prefix=True, kvthrift=METHODS["snapkv"])
    assert all(first["right"] + second["right"])
    assert second["cached"][0] == 0
    assert first["left"] == second["left"] == 0
    (other,) = engine(rounds=[{"requests": 2, "lora": wild}], lora=True, prefix=True, kvthrift=METHODS["snapkv"])
    assert other["tokens"] != first["tokens"]  # the adapter was at work


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"method": "h2o", "budget": 64}, "column sums"),
        ({"method": "pyramidkv", "budget": 256}, "groups"),
    ],
)
def test_what_cannot_be_honoured_stops_the_start(wrong: dict[str, Any], word: str) -> None:
    done = start(requests=1, kvthrift=wrong)
    assert done.returncode != 0
    assert word in done.stderr
