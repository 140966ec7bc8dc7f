"""A stock engine on a GPU with the plugin: the same as on a CPU, with CUDA graphs, both runners and both kernels.

Needs vLLM 0.26 and a GPU of compute capability 9.0; engines share it, so that tests may run side by side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import torch
from tests.rotated import attended, layer, off
from tests.vllm.models import mixed_model, random_model
from tests.vllm.names import missing
from tests.vllm.running import engine, start
from tests.vllm.serving import check_eight_clients, serving
from tests.vllm.twin import Record, Rounding, in_int8, log_probabilities

from kvthrift.integrations.vllm.contract import PRIVATE_GPU, check_served
from kvthrift.integrations.vllm.plan import Policy, plan

BLOCK = 32
COMPRESSED = {"snapkv": {"method": "snapkv", "budget": 256}, "adakv": {"method": "adakv", "budget": 256}}
FIRST = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"graphs": "full"},
    "compiled": {"graphs": "both"},
    "triton": {"graphs": "full", "attention": "TRITON_ATTN"},
    "first runner": {"graphs": "full", "env": FIRST},
}

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_every_private_name_is_there() -> None:
    assert check_served() == "cuda"
    assert {path: lost for path, names in PRIVATE_GPU.items() if (lost := missing(path, names))} == {}


def test_without_being_asked_it_is_vllm_as_it_was() -> None:
    (found,) = engine(requests=3, graphs="full")
    assert all(found["right"])
    assert max(step["used"] for step in found["steps"]) == sum(-(-(n + 10) // BLOCK) for n in found["prompt"])
    assert found["left"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", COMPRESSED)
def test_exactly_the_planned_blocks_come_back(method: str, form: str) -> None:
    (found,) = engine(requests=8, kvthrift={**COMPRESSED[method], "check": True}, **FORMS[form])
    whole = [-(-(n + 10) // BLOCK) for n in found["prompt"]]
    dropped = [plan(n, n, BLOCK, Policy(entries=256)).dropped for n in found["prompt"]]
    together = [step for step in found["steps"] if step["decoding"] == 8]
    assert together
    assert {step["used"] for step in together} <= {sum(whole) - sum(dropped) - extra for extra in range(9)}
    assert found["right"] == [True] * 8
    assert found["left"] == 0


CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"cache": "fp8", "attention": "FLASH_ATTN"},
    "fp8 triton": {"cache": "fp8", "attention": "TRITON_ATTN"},
    "fp8 per token": {"cache": "fp8_per_token_head", "attention": "TRITON_ATTN"},
    "int8 per token": {"cache": "int8_per_token_head", "attention": "TRITON_ATTN"},
    "int4 per token": {"cache": "int4_per_token_head", "attention": "TRITON_ATTN"},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", COMPRESSED)
def test_a_cache_of_fewer_bits_gives_back_as_many_blocks(method: str, cache: str) -> None:
    asked = {"requests": 8, "graphs": "full", **CACHES[cache]}
    (stock,), (found,) = (engine(**asked, **more) for more in ({}, {"kvthrift": {**COMPRESSED[method], "check": True}}))
    whole = [-(-(n + 10) // BLOCK) for n in found["prompt"]]
    dropped = [plan(n, n, BLOCK, Policy(entries=256)).dropped for n in found["prompt"]]
    together = [step for step in found["steps"] if step["decoding"] == 8]
    assert together
    assert {step["used"] for step in together} <= {sum(whole) - sum(dropped) - extra for extra in range(9)}
    assert sum(stock["right"]) >= (7 if cache.startswith("int4") else 8)  # which vLLM alone does not always answer
    assert sum(found["right"]) >= 7  # three bits of a number are few for a model as small as this one
    assert found["left"] == 0


@pytest.mark.parametrize("dim", [64, 128])
def test_four_bits_are_read_as_vllm_writes_and_reads_them(dim: int) -> None:
    from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    from kvthrift.integrations.vllm.gpu_rotation import rotation_back

    pages, blocks, numbers = layer(reshape_and_cache_int4, rotation_back(dim, torch.device("cuda")), 2)
    for found, x in zip(pages.read(pages.of(blocks)), numbers, strict=True):
        for head in range(pages.heads):
            assert off(found[head][: len(x)], x[:, head]) < 0.15
    found, want = attended(unified_attention, KVQuantMode.INT4_PER_TOKEN_HEAD, pages, blocks)
    assert off(found, want) < 0.05  # queries and answers are rotated in 16 bits


@pytest.mark.parametrize("method", COMPRESSED)
def test_where_steps_are_scheduled_ahead(method: str) -> None:
    asked = {**COMPRESSED[method], "check": True}
    rounds = [{"requests": 8}, {"requests": 8}]
    first, second = engine(rounds=rounds, prefix=True, graphs="full", kvthrift=asked, **{"async": True})
    assert first["right"] == second["right"] == [True] * 8
    assert min(second["cached"]) > 0
    assert first["left"] == second["left"] == 0


OFTEN = {"budget": 128, "every": 16, "check": True}
ASKED: dict[str, dict[str, Any]] = {
    "snapkv": {"method": "snapkv", "budget": 128, "check": True},
    "adakv": {"method": "adakv", "budget": 128, "check": True},
    "snapkv often": {"method": "snapkv", **OFTEN},
    "adakv often": {"method": "adakv", "chunks": True, **OFTEN},
    "pyramidkv": {"method": "pyramidkv", "groups": 3, **OFTEN},
}
FLAGS = ("--method", "adakv", "--budget", "256", "--gpu-memory-utilization", "0.02", "--kv-cache-memory-bytes", "1G")
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


@pytest.mark.parametrize(("name", "cache"), [*((name, "auto") for name in ASKED), ("adakv", "int8_per_token_head")])
def test_each_token_sees_what_its_heads_kept(name: str, cache: str, tmp_path: Path) -> None:
    """In float32 (products in TF32) and teacher-forced: log p is that of a model that sees what was kept."""
    record = str(tmp_path / "record.pt")
    asked = {"requests": 2, "fill": 16, "tokens": 40, "dtype": "float32", "attention": "TRITON_ATTN", "graphs": "full"}
    (found,) = engine(**asked, cache=cache, batched=446, record=record, kvthrift=ASKED[name])
    rounding = None if cache == "auto" else in_int8
    records: dict[str, Any] = torch.load(record)
    for index in range(2):
        mine = next(layers for request, layers in records.items() if request.startswith(f"0-{index}"))
        assert len(mine) == 30
        kept, everything = (_off(found, index, seen, rounding) for seen in (mine, {}))
        print(f"{name}: mean |d log p| {kept:.2g} seeing what was kept, {everything:.2g} seeing everything")
        assert kept < (5e-3 if rounding is None else 5e-2)
        assert kept < everything / (3 if rounding is None else 2)  # or the comparison would say nothing


def _off(found: dict[str, Any], index: int, record: Record, rounding: Rounding | None) -> float:
    """Mean difference of log p."""
    want = log_probabilities(found["ids"][index], found["tokens"][index], record, rounding)
    return sum(abs(a - b) for a, b in zip(want, found["logprobs"][index], strict=True)) / len(want)


@pytest.mark.parametrize("method", COMPRESSED)
def test_layers_with_a_window_are_left_as_they_are(method: str, tmp_path: Path) -> None:
    asked = {"requests": 2, "model": mixed_model(tmp_path), "attention": "TRITON_ATTN", "graphs": "full"}
    (stock,), (found,) = (engine(**asked, **more) for more in ({}, {"kvthrift": {**COMPRESSED[method], "check": True}}))
    dropped = sum(plan(n, n, BLOCK, Policy(entries=256)).dropped for n in found["prompt"])
    before, after = ([step["used"] for step in run["steps"] if step["decoding"] == 2] for run in (stock, found))
    assert before[-1] - after[-1] == dropped
    assert found["left"] == 0


def test_preempted_requests_are_read_anew() -> None:
    asked = {**COMPRESSED["adakv"], "check": True}
    (found,) = engine(requests=4, tokens=500, blocks=72, graphs="full", kvthrift=asked)
    assert found["preempted"] >= 1
    assert found["left"] == 0


@pytest.mark.parametrize(("cache", "number_bytes"), [("auto", 2), ("fp8", 1)])
def test_a_server_answers_eight_clients(cache: str, number_bytes: int, tmp_path: Path) -> None:
    flags = (*FLAGS, "--kv-cache-dtype", cache, "--compilation-config", json.dumps(GRAPHS))
    log = tmp_path / "log"
    with serving(log, *flags, VLLM_USE_FLASHINFER_SAMPLER="0") as client:
        check_eight_clients(client, [Policy(entries=256, least=32)] * 30, number_bytes)
    assert log.read_text().count("kvthrift: adakv, 256 entries a head") == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_keep_and_say_what_one_does(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "requests": 4,
        "tokens": 20,
        "dtype": "float32",
        "attention": "TRITON_ATTN",
        "graphs": "full",
    }
    asked["env"] = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    model = random_model(tmp_path / "model")
    one, two = (engine(**asked, model=model, tp=n, kvthrift={"method": "snapkv", "budget": 256})[0] for n in (1, 2))
    assert len({token for answer in one["tokens"] for token in answer}) > 20  # or agreeing would say nothing
    assert one["tokens"] == two["tokens"]
    torch.testing.assert_close(torch.tensor(one["logprobs"]), torch.tensor(two["logprobs"]), atol=0.05, rtol=0)
    assert one["steps"] == two["steps"]
    assert one["left"] == two["left"] == 0


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"kvthrift": {"method": "h2o", "budget": 64}}, "column sums"),
        ({"kvthrift": {"method": "snapkv", "budget": 64, "chunks": True}, "async": True}, "no-async-scheduling"),
        ({"kvthrift": {"method": "snapkv", "budget": 64}, "attention": "FLEX_ATTENTION"}, "FLASH_ATTN"),
        ({"kvthrift": {"method": "snapkv", "budget": 64}, "cache": "turboquant_k8v4"}, "dtype turboquant_k8v4"),
    ],
)
def test_what_cannot_be_honoured_stops_the_start(wrong: dict[str, Any], word: str) -> None:
    done = start(requests=1, **wrong)
    assert done.returncode != 0
    assert word in done.stderr
