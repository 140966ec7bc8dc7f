"""Compressed more than once: while a prompt is read, while it is answered, and with classes of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from tests.vllm.running import engine, groups
from tests.vllm.twin import Record, Rounding, in_fp8, log_probabilities

from kvthrift.integrations.vllm.plan import Policy, plan

BLOCK = 32
SHORT = {"requests": 2, "fill": 16, "tokens": 40}
OFTEN = {"budget": 128, "every": 16, "chunks": True, "check": True}
ASKED = {
    "snapkv": {"method": "snapkv", **OFTEN},
    "adakv": {"method": "adakv", **OFTEN},
    "pyramidkv": {"method": "pyramidkv", "groups": 3, **OFTEN},
}

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(
    ("method", "cache"), [*((method, "auto") for method in ASKED), ("snapkv", "fp8"), ("adakv", "fp8")]
)
def test_each_token_sees_exactly_what_its_heads_kept(method: str, cache: str, tmp_path: Path) -> None:
    """In float32, and teacher-forced: log p is that of a model that sees what was kept, and no other.

    In fp8 tiny differences become one of its steps here and there, so that an engine that keeps everything is off by
    0.016, too.
    """
    record, rounding = str(tmp_path / "record.pt"), in_fp8 if cache == "fp8" else None
    (found,) = engine(**SHORT, batched=128, dtype="float32", cache=cache, record=record, kvthrift=ASKED[method])
    records: dict[str, Any] = torch.load(record)
    for index in range(SHORT["requests"]):
        mine = next(layers for name, layers in records.items() if name.startswith(f"0-{index}"))
        assert len(mine) == 30
        assert max(len(events) for events in mine.values()) >= 4  # in the prompt and in the answer
        kept, everything = (_off(found, index, seen, rounding) for seen in (mine, {}))
        assert kept < (1e-4 if rounding is None else everything / 3)
        assert everything > 1e-2  # or the comparison would say nothing


def _off(found: dict[str, Any], index: int, record: Record, rounding: Rounding | None) -> float:
    """Mean difference of log p."""
    want = log_probabilities(found["ids"][index], found["tokens"][index], record, rounding)
    return sum(abs(a - b) for a, b in zip(want, found["logprobs"][index], strict=True)) / len(want)


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_an_answer_gives_back_what_it_outgrows(method: str) -> None:
    asked = {"method": method, "budget": 128, "every": 16, "check": True}
    (found,) = engine(requests=1, fill=16, tokens=70, kvthrift=asked)
    (prompt,), policy = found["prompt"], Policy(entries=128, least=32, every=16)
    used = [step["used"] for step in found["steps"]]
    for number, now in enumerate(used[1:-1], start=1):  # blocks are taken for one token more than were settled before
        settled = prompt + number - 1
        assert now == -(-(settled + 1) // BLOCK) - plan(prompt, settled, BLOCK, policy).dropped
    assert max(used[2:]) <= 4 + 2
    assert found["left"] == 0


@pytest.mark.parametrize("method", ["keydiff", "adakv"])
def test_a_prompt_larger_than_the_pool_is_read_and_answered(method: str) -> None:
    """1,503 tokens are 47 blocks, and there are 27; never are more taken than budget, a step's tokens and one block."""
    asked = {"method": method, "budget": 256, "chunks": True, "every": 32, "check": True}
    (found,) = engine(requests=2, batched=128, blocks=28, kvthrift=asked)
    kept, step = asked["budget"] // BLOCK, 128 // BLOCK
    assert found["prompt"] == [1503, 1503]
    if method == "keydiff":  # the last queries of a step know nothing of a question that comes later
        assert all(found["right"])
    alone = [s["used"] for s in found["steps"] if s["running"] == 1]
    assert alone
    assert max(alone) <= kept + step + 1
    assert found["left"] == 0


def test_classes_of_layers_have_block_tables_of_their_own() -> None:
    asked: dict[str, Any] = {"method": "pyramidkv", "budget": 256, "groups": 3, "check": True}
    rounds = [{"requests": 2}, {"requests": 2}]
    first, second = engine(rounds=rounds, prefix=True, kvthrift=asked)
    assert groups(rounds=rounds, prefix=True, kvthrift=asked) == 3
    assert all(first["right"] + second["right"])
    assert first["cached"][0] == 0
    assert min(second["cached"]) > 0
    stock = 3 * 2 * 47  # three tables
    together = [s["used"] for s in first["steps"] if s["decoding"] == 2]
    assert max(together) <= stock // 4
    assert first["left"] == second["left"] == 0
