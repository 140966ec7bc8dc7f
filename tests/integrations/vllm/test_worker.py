"""What a step means for each request, and that a disagreement about it is noticed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvthrift
from kvthrift.allocate import BudgetLayers
from kvthrift.errors import CacheStateError, ModelMismatchError, UnsupportedModelError
from kvthrift.integrations.vllm.plan import Policy
from kvthrift.integrations.vllm.runner import Rows, layer_index
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.integrations.vllm.worker import (
    Step,
    _check_calibration,
    _refuse,
    check_blocks,
    read_rows,
    refuse_attention,
    refuse_split,
    refuse_together,
    shifted,
)

BLOCK = 4
POLICY = Policy(entries=8)


def step_of(
    prompts: list[int], news: list[int], lengths: list[int], table: list[list[int]], policy: Policy = POLICY
) -> Step:
    starts = [sum(news[:n]) for n in range(len(news) + 1)]
    batch = Rows(tuple("abc"[: len(prompts)]), tuple(prompts))
    rows, _ = read_rows(batch, starts, lengths, BLOCK, policy)
    return Step(rows, torch.tensor(table))


def test_rows_know_what_was_and_what_will_be_given_back() -> None:
    batch = Rows(("a", "b", "c"), (20, 20, 9))
    rows, dropped = read_rows(batch, [0, 20, 21, 22], [20, 25, 9], BLOCK, POLICY)
    assert dropped.tolist() == [0, 3, 0]
    assert [row.due for row in rows] == [True, False, False]
    assert [(row.first, row.done, row.length) for row in rows] == [(0, 0, 20), (20, 24, 25), (21, 8, 9)]


def test_a_kernel_sees_a_shorter_request() -> None:
    lines, lengths = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), torch.tensor([15, 9])
    table, seen = shifted(lines, lengths, torch.tensor([2, 0]), BLOCK)
    assert table[0, :2].tolist() == [7, 8]
    assert table[1].tolist() == [1, 2, 3, 4]
    assert seen.tolist() == [7, 9]


GOOD = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]


def test_where_both_sides_agree_nothing_is_said() -> None:
    step = step_of([20, 9], [1, 1], [22, 10], GOOD)
    check_blocks(step, POLICY, BLOCK, {"a": 3, "b": 0}.get)
    check_blocks(step, POLICY, BLOCK, lambda _: None)


@pytest.mark.parametrize("freed", [0, 2, 4])
def test_counts_that_differ_are_noticed(freed: int) -> None:
    step = step_of([20, 9], [1, 1], [22, 10], GOOD)
    with pytest.raises(CacheStateError, match=f"3 blocks back by the worker's count after 21 tokens, and {freed} by"):
        check_blocks(step, POLICY, BLOCK, {"a": freed, "b": 0}.get)


def test_a_scheduler_that_is_ahead_may_have_taken_fewer_blocks_and_no_more() -> None:
    step = step_of([20, 9], [1, 1], [22, 10], GOOD)
    check_blocks(step, POLICY, BLOCK, {"a": 0, "b": 0}.get, late=True)
    with pytest.raises(CacheStateError, match="and 4 by"):
        check_blocks(step, POLICY, BLOCK, {"a": 4, "b": 0}.get, late=True)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ([[1, 2, 3, 0, 5, 6], GOOD[1]], "block 0"),  # a block that was given back is read
        ([[1, 2, 3, 4, 5, 6], [7, 6, 9, 0, 0, 0]], "all hold block 6"),
        ([[1, 2, 3, 7, 5, 6], GOOD[1]], "all hold block 7"),
    ],
)
def test_blocks_that_another_request_holds_are_noticed(table: list[list[int]], word: str) -> None:
    with pytest.raises(CacheStateError, match=word):
        check_blocks(step_of([20, 9], [1, 1], [22, 10], table), POLICY, BLOCK, lambda _: None)


def test_a_shared_beginning_is_no_fault_and_what_was_given_back_may_be_anybodys() -> None:
    same = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]]  # both prompts of 20 drop, and so share, the first three
    check_blocks(step_of([20, 20], [4, 4], [20, 20], same), POLICY, BLOCK, lambda _: None)
    often = replace(POLICY, chunk=8)  # no block of a prompt that is compressed while it is read may be shared
    with pytest.raises(CacheStateError, match="all hold block 1"):
        check_blocks(step_of([20, 20], [4, 4], [12, 12], same, often), often, BLOCK, lambda _: None)
    given = [[9, 9, 9, 4, 5, 6], [7, 8, 9, 0, 0, 0]]
    check_blocks(step_of([20, 9], [1, 1], [22, 10], given), POLICY, BLOCK, lambda _: None)


def config(device: str = "cuda", **changed: Any) -> Any:
    """As much of an engine's config as is looked at."""
    values: dict[str, Any] = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "use_ubatching": False,
        "async_scheduling": False,
        "cache_dtype": "auto",
        "kv_cache_dtype_skip_layers": [],
        **changed,
    }
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        kv_transfer_config=values["kv_transfer_config"],
        speculative_config=values["speculative_config"],
        parallel_config=SimpleNamespace(**values),
        scheduler_config=SimpleNamespace(**values),
        cache_config=SimpleNamespace(**values),
        model_config=SimpleNamespace(is_mm_prefix_lm=values.get("prefix", False)),
    )


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"kv_transfer_config": "x"}, "KV connector"),
        ({"speculative_config": "x"}, "speculative"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"use_ubatching": True}, "DBO"),
        ({"cache_dtype": "nvfp4"}, "dtype nvfp4"),
        ({"cache_dtype": "turboquant_4bit_nc"}, r"dtype turboquant_4bit_nc \(a backend"),
        ({"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "unequal dtypes"),
        ({"prefix": True}, "bidirectional"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_was_not_shown_to_be_right_is_refused(device: str, changed: dict[str, Any], word: str) -> None:
    _refuse(config(device))
    with pytest.raises(UnsupportedModelError, match=word):
        _refuse(config(device, **changed))


@pytest.mark.parametrize(
    ("device", "other", "name"),
    [
        ("cpu", "cuda", "fp8_e5m2"),
        ("cuda", "cpu", "int8_per_token_head"),
        ("cuda", "cpu", "int4_per_token_head"),
    ],
)
def test_a_cache_dtype_is_served_where_vllm_has_it(device: str, other: str, name: str) -> None:
    for one in ("fp8", "fp8_e4m3", name):
        _refuse(config(device, cache_dtype=one))
    with pytest.raises(UnsupportedModelError, match=f"dtype {name}"):
        _refuse(config(other, cache_dtype=name))


@pytest.mark.parametrize(
    ("changed", "word"), [({"tensor_parallel_size": 2}, "tensor"), ({"async_scheduling": True}, "asynchronous")]
)
def test_what_is_done_on_gpus_only_is_refused_on_a_cpu(changed: dict[str, Any], word: str) -> None:
    _refuse(config("cuda", **changed))
    with pytest.raises(UnsupportedModelError, match=word):
        _refuse(config("cpu", **changed))


def test_chunks_need_blocks_back_at_once() -> None:
    settings = Settings(kvthrift.method("snapkv", budget=64), POLICY, (POLICY,))
    often = replace(settings, policy=replace(POLICY, chunk=8))
    refuse_together(settings, config(async_scheduling=True))
    refuse_together(often, config())
    with pytest.raises(UnsupportedModelError, match="--no-async-scheduling"):
        refuse_together(often, config(async_scheduling=True))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"logits_soft_cap": 30.0}, "soft-cap"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"sinks": torch.ones(2)}, "sinks"),
        ({"kv_sharing_target_layer_name": "other"}, "another layer's"),
        ({"attn_type": "encoder"}, "both sides"),
        ({"kv_cache_dtype": "nvfp4"}, r"cache in nvfp4 \(FlashInfer"),
        ({"kv_cache_dtype": "int4_per_token_head", "head_size": 96}, "heads of 96 numbers"),
    ],
)
def test_attention_that_is_not_plain_is_refused(changed: dict[str, Any], word: str) -> None:
    plain: dict[str, Any] = {
        "logits_soft_cap": 0,
        "alibi_slopes": None,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
        "attn_type": "decoder",
        "kv_cache_dtype": "auto",
        "head_size": 64,
    }
    refuse_attention(SimpleNamespace(**plain), "cpu")
    for name in ("fp8", "int4_per_token_head"):
        refuse_attention(SimpleNamespace(**{**plain, "kv_cache_dtype": name}), "cuda")
    with pytest.raises(UnsupportedModelError, match=word):
        refuse_attention(SimpleNamespace(**{**plain, **changed}), "cuda")


def test_blocks_that_a_kernel_splits_are_refused() -> None:
    refuse_split(16, 16)
    with pytest.raises(UnsupportedModelError, match="--block-size 16"):
        refuse_split(784, 16)


def test_numbers_of_another_model_are_refused() -> None:
    recipe = kvthrift.method("snapkv", budget=64).with_options(layers=BudgetLayers((64, 64), model="abc"))
    settings = Settings(recipe, POLICY, (POLICY,) * 2)
    _check_calibration(settings, "abc")
    with pytest.raises(ModelMismatchError, match=r"abc.*def"):
        _check_calibration(settings, "def")


def test_a_layers_number() -> None:
    assert layer_index("model.layers.17.self_attn.attn") == 17
    with pytest.raises(kvthrift.errors.UnsupportedModelError, match="no number"):
        layer_index("attention")
