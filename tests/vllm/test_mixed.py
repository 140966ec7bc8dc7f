"""Models of which only some layers are compressed, and starts at which something stands in the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from tests.vllm.models import mixed_model
from tests.vllm.running import engine, start

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.plan import Policy, plan
from kvthrift.integrations.vllm.settings import Settings, read_settings

BLOCK = 32
SAYS = {"VLLM_LOGGING_LEVEL": "INFO"}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mixed_model(tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_layers_with_a_window_are_left_as_they_are(mixed: str, method: str) -> None:
    asked: dict[str, Any] = {"requests": 2, "model": mixed, "dtype": "float32"}
    stock, found = (
        engine(**asked, **more)[0] for more in ({}, {"kvthrift": {"method": method, "budget": 256, "check": True}})
    )
    dropped = sum(plan(n, n, BLOCK, Policy(entries=256, least=32)).dropped for n in found["prompt"])
    before, after = ([s["used"] for s in run["steps"] if s["decoding"] == 2] for run in (stock, found))
    assert [a - b for a, b in zip(before[1:], after[1:], strict=True)] == [dropped] * len(after[1:])
    assert found["left"] == 0


def test_a_start_says_which_layers_stay_whole(mixed: str) -> None:
    done = start(requests=1, model=mixed, dtype="float32", kvthrift={"method": "snapkv", "budget": 256}, env=SAYS)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if "kvthrift: snapkv" in line)
    assert "1 of 4 layers, the others stay whole (3 of SlidingWindow)" in line
    assert "given back" not in line


def test_one_group_of_both_kinds_is_refused(mixed: str) -> None:
    flag = {"disable_hybrid_kv_cache_manager": True}
    done = start(requests=1, model=mixed, dtype="float32", kvthrift={"method": "snapkv", "budget": 256}, engine=flag)
    assert done.returncode != 0
    assert "--disable-hybrid-kv-cache-manager" in done.stderr


def test_a_budget_larger_than_any_prompt_is_said_once_and_changes_nothing() -> None:
    (stock,) = engine(requests=2)
    asked = {"requests": 2, "kvthrift": {"method": "adakv", "budget": 4096, "check": True}}
    (found,) = engine(**asked)
    assert [found[name] for name in ("steps", "tokens")] == [stock[name] for name in ("steps", "tokens")]
    done = start(**asked, env=SAYS)
    assert done.stdout.count("no request of at most 2,048 tokens outgrows that, so nothing will be given back") == 1


def test_where_another_plugin_came_first_it_is_said_and_refused_if_asked() -> None:
    done = start(requests=1, rival=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kvthrift leaves CPU_ATTN (tests.vllm.rival.Rival) to another plugin" in done.stderr
    done = start(requests=1, rival=True, kvthrift={"method": "snapkv", "budget": 256})
    assert done.returncode != 0
    assert "CPU_ATTN is tests.vllm.rival.Rival, another plugin's" in done.stderr


def settings() -> Settings:
    found = read_settings({"kvthrift": {"method": "snapkv", "budget": 256}}, layers=2, kv_heads=2, entry_bytes=256)
    assert found is not None
    return found


def test_only_full_attention_has_a_policy() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

    from kvthrift.integrations.vllm.spec import CompressedSpec, compressed

    size: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    others = [
        SlidingWindowSpec(**size, sliding_window=512),
        MLAAttentionSpec(**size),
        MambaSpec(block_size=BLOCK, shapes=((4, 4),), dtypes=(torch.float32,)),
        FullAttentionSpec(**size, sliding_window=512),
        FullAttentionSpec(**size, attention_chunk_size=512),
    ]
    for spec in others:
        assert compressed(spec, settings(), lambda: 0) is spec
    assert isinstance(compressed(FullAttentionSpec(**size), settings(), lambda: 0), CompressedSpec)


def test_an_engine_in_which_nothing_is_compressed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvthrift.integrations.vllm import spec

    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=2048))
    monkeypatch.setattr(spec, "settings_of", lambda _: None)
    spec.check_compressed(config, {"a": object()}, [], dict)
    monkeypatch.setattr(spec, "settings_of", lambda _: settings())
    with pytest.raises(UnsupportedModelError, match=r"no full attention.*FLASH_ATTN is other\.Backend"):
        spec.check_compressed(config, {"a": object()}, [], lambda: {"FLASH_ATTN": "other.Backend"})
