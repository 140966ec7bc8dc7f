"""What CUDA computes, on every path of the dispatch, against attention written out in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import AttentionOutput
from kvthrift.kernels import attention, naive

pytestmark = pytest.mark.gpu

LENGTHS = (1, 63, 64, 65, 1000)
RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm
LSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def tensors(
    group: int, dim: int, queries: int, entries: int, dtype: torch.dtype, value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as the store hands them out: the front of longer rows, behind which nothing may be read."""
    k, v = (torch.full((2, 2, entries + 64, d), torch.nan, dtype=dtype, device="cuda") for d in (dim, value_dim or dim))
    q = torch.randn(2, 2 * group, queries, dim, device="cuda").to(dtype)
    k[:, :, :entries] = torch.randn(2, 2, entries, k.shape[-1], device="cuda")
    v[:, :, :entries] = torch.randn(2, 2, entries, v.shape[-1], device="cuda")
    return q, k[:, :, :entries], v[:, :, :entries]


def check(q: Tensor, k: Tensor, v: Tensor, *, need_lse: bool, causal: bool = False, bias: Tensor | None = None) -> None:
    scale = q.shape[-1] ** -0.5
    twin = naive.attend(q.float(), k.float(), v.float(), scale=scale, causal=causal, bias=bias)
    got = kernels.attend(q, k, v, scale=scale, causal=causal, bias=bias, need_lse=need_lse)
    assert got.out.dtype == q.dtype
    assert got.out.shape == twin.out.shape
    assert float((got.out - twin.out).norm() / twin.out.norm()) < RELATIVE[q.dtype]
    assert (got.lse is not None) == need_lse
    if got.lse is not None and twin.lse is not None:
        assert got.lse.dtype == torch.float32
        torch.testing.assert_close(got.lse, twin.lse, atol=LSE[q.dtype], rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_returns_the_log_sum_exp(
    dtype: torch.dtype, group: int, dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "_blocked")  # the slow path must not be needed
    for entries, queries in itertools.product(LENGTHS, (1, 5, 65)):
        check(*tensors(group, dim, entries if causal else queries, entries, dtype), need_lse=True, causal=causal)


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_to_the_past_and_causal_attention(dtype: torch.dtype, group: int, need_lse: bool) -> None:
    for dim, entries in itertools.product((16, 80, 128), LENGTHS):
        for queries in (1, 5, 65):
            check(*tensors(group, dim, queries, entries, dtype), need_lse=need_lse)
        check(*tensors(group, dim, entries, entries, dtype), need_lse=need_lse, causal=True)


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heads_of_different_lengths(dtype: torch.dtype, group: int, need_lse: bool) -> None:
    for dim, entries, queries in itertools.product((64, 80, 256), LENGTHS, (1, 5, 65)):
        q, k, v = tensors(group, dim, queries, entries, dtype)
        lengths = torch.randint(1, entries + 1, (2, 2), device="cuda")
        there = torch.arange(entries, device="cuda") < lengths[..., None]
        logged = torch.randint(0, 5, (2, 2, entries), device="cuda") / 4  # exact in bf16
        check(q, k, v, need_lse=need_lse, bias=logged.masked_fill(~there, -torch.inf))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(20, 20), (192, 128), (288, 288)])
def test_head_dims_that_flash_attention_does_not_take(dims: tuple[int, int], causal: bool) -> None:
    for length in (1, 65, 700):
        check(*tensors(3, dims[0], length, length, torch.bfloat16, dims[1]), need_lse=True, causal=causal)


def test_long_float32_attention_stores_no_matrix() -> None:
    q, k, v = tensors(4, 64, 8192, 8192, torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.attend(q, k, v, scale=0.1, causal=True)
    assert torch.cuda.max_memory_allocated() - before < 2**30  # [Q, Q] would be 4 GiB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_merged_parts_are_the_whole(dtype: torch.dtype, group: int) -> None:
    q, k, v = tensors(group, 64, 9, 600, dtype)
    ends = itertools.pairwise((0, 1, 400, 600))
    parts = [kernels.attend(q, k[:, :, a:b], v[:, :, a:b], scale=0.1, need_lse=True) for a, b in ends]
    parts.append(AttentionOutput(torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device="cuda")))
    whole = naive.attend(q.float(), k.float(), v.float(), scale=0.1)
    got = kernels.merge(parts)
    assert got.out.dtype == dtype
    assert float((got.out - whole.out).norm() / whole.out.norm()) < RELATIVE[dtype]
    torch.testing.assert_close(got.lse, whole.lse, atol=1e-3, rtol=1e-4)


def test_scores_are_those_of_the_cpu() -> None:
    q, k, v = tensors(3, 64, 700, 700, torch.float32)
    steps = torch.arange(700, device="cuda").expand(2, 700)
    valid = torch.arange(700, device="cuda") < torch.tensor([[700, 650], [1, 699]], device="cuda")[..., None]
    lse = kernels.attend(q, k, v, scale=0.2, causal=True, need_lse=True).lse
    where = {"q_positions": steps, "k_positions": steps[:, None].expand(2, 2, 700), "valid": valid}
    mine = {name: t.cpu() for name, t in where.items()}
    assert lse is not None
    for got, expected in (
        (
            kernels.column_sums(q, k, **where, scale=0.2, lse=lse),
            kernels.column_sums(q.cpu(), k.cpu(), **mine, scale=0.2, lse=lse.cpu()),
        ),
        (
            kernels.window_attention(q[:, :, -32:], k, **{**where, "q_positions": steps[:, -32:]}, scale=0.2),
            kernels.window_attention(
                q[:, :, -32:].cpu(), k.cpu(), **{**mine, "q_positions": mine["q_positions"][:, -32:]}, scale=0.2
            ),
        ),
        (
            kernels.entry_attention(q[:, :, -1:], k, valid=valid, scale=0.2),
            kernels.entry_attention(q[:, :, -1:].cpu(), k.cpu(), valid=mine["valid"], scale=0.2),
        ),
    ):
        torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)
