"""Every path of attend against attention written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.kernels import attention, naive

LENGTHS = (1, 2, 63, 64, 65, 257)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("bhqd,bhtd->bhqt", q.double(), keys) * scale
    if bias is not None:
        logits += bias.double().repeat_interleave(group, dim=1)[:, :, None]
    if causal:
        ahead = torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None]
        logits = logits.masked_fill(ahead, -torch.inf)
    return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)


def check(q: Tensor, k: Tensor, v: Tensor, need_lse: bool, causal: bool = False, bias: Tensor | None = None) -> None:
    tolerance = TOLERANCE[q.dtype]
    scale = q.shape[-1] ** -0.5
    out, lse = reference(q, k, v, scale, causal, bias)
    got = kernels.attend(q, k, v, scale=scale, causal=causal, bias=bias, need_lse=need_lse)
    twin = naive.attend(q, k, v, scale=scale, causal=causal, bias=bias)
    for found in (got, twin):
        assert found.out.dtype == q.dtype
        torch.testing.assert_close(found.out.double(), out, atol=tolerance, rtol=tolerance)
    assert (got.lse is not None) == need_lse
    for found in (got, twin) if need_lse else (twin,):
        assert found.lse is not None
        assert found.lse.dtype == torch.float32
        torch.testing.assert_close(found.lse.double(), lse, atol=tolerance, rtol=tolerance)


def tensors(
    group: int, dim: int, queries: int, entries: int, dtype: torch.dtype, value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 2 * group, queries, dim).to(dtype),
        torch.randn(2, 2, entries, dim).to(dtype),
        torch.randn(2, 2, entries, value_dim or dim).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_causal_attention_at_awkward_lengths(dtype: torch.dtype, need_lse: bool, group: int) -> None:
    for dim, length in itertools.product((16, 64, 80), LENGTHS):
        check(*tensors(group, dim, length, length, dtype), need_lse, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_to_the_past_at_awkward_lengths(dtype: torch.dtype, need_lse: bool, group: int, biased: bool) -> None:
    for dim, entries, queries in itertools.product((16, 80), LENGTHS, (1, 2, 65)):
        q, k, v = tensors(group, dim, queries, entries, dtype)
        bias = None
        if biased:  # ragged heads, and logs of masses on what is there
            lengths = torch.randint(1, entries + 1, (2, 2))
            there = torch.arange(entries) < lengths[..., None]
            logged = torch.randint(0, 5, (2, 2, entries)) / 4  # exact in bf16
            bias = logged.masked_fill(~there, -torch.inf)
        check(q, k, v, need_lse, bias=bias)


@pytest.mark.parametrize("causal", [False, True])
def test_values_may_be_narrower_than_keys(causal: bool) -> None:
    for length, value_dim in itertools.product((1, 65), (8, 24)):
        for need_lse in (False, True):
            check(*tensors(3, 16, length, length, torch.float32, value_dim), need_lse, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_queries_sees_what_the_block_before_it_saw(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 64)
    check(*tensors(2, 16, 257, 257, torch.float32, 8), True, causal)


def test_what_a_bias_hides_is_never_read() -> None:
    q, k, v = tensors(3, 16, 5, 40, torch.float32)
    bias = torch.zeros(2, 2, 40)
    bias[:, 1, 30:] = -torch.inf
    for need_lse in (False, True):
        plain = kernels.attend(q, k, v, scale=0.25, bias=bias, need_lse=need_lse)
        loud_k, loud_v = k.clone(), v.clone()
        loud_k[:, 1, 30:], loud_v[:, 1, 30:] = 1e4, -1e4
        again = kernels.attend(q, loud_k, loud_v, scale=0.25, bias=bias, need_lse=need_lse)
        torch.testing.assert_close(again.out, plain.out, atol=0, rtol=0)


def test_causal_attention_refuses_what_it_cannot_mean() -> None:
    q, k, v = tensors(1, 16, 3, 5, torch.float32)
    with pytest.raises(ValueError, match="as many queries"):
        kernels.attend(q, k, v, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="no bias"):
        kernels.attend(q, k[:, :, :3], v[:, :, :3], scale=1.0, causal=True, bias=torch.zeros(2, 2, 3))


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    q, k, v = tensors(2, 16, 3, 4, torch.float32)
    bias = torch.zeros(2, 2, 4)
    bias[0, 1] = -torch.inf
    for found in (
        naive.attend(q, k, v, scale=1.0, bias=bias),
        kernels.attend(q, k, v, scale=1.0, bias=bias, need_lse=True),
        kernels.attend(q, k, v[..., :8], scale=1.0, bias=bias, need_lse=True),
    ):
        assert found.lse is not None
        assert (found.out[0, 2:] == 0).all()
        assert (found.lse[0, 2:] == -torch.inf).all()
        assert found.out.isfinite().all()
        assert found.lse[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_call_of_transformers_is_the_same_attention(dtype: torch.dtype, causal: bool) -> None:
    for group, length in itertools.product((1, 3), (1, 65)):
        q, k, v = tensors(group, 16, length, length, dtype)
        out, _ = reference(q, k, v, 0.25, causal)
        got = kernels.attend(q, k, v, scale=0.25, causal=causal, verbatim=True).out
        torch.testing.assert_close(got.double(), out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_what_that_call_cannot_do_is_done_all_the_same() -> None:
    q, k, v = tensors(3, 16, 5, 40, torch.float32)
    bias = torch.zeros(2, 2, 40)
    bias[:, 1, 30:] = -torch.inf
    out, lse = reference(q, k, v, 0.25, bias=bias)
    got = kernels.attend(q, k, v, scale=0.25, bias=bias, need_lse=True, verbatim=True)
    assert got.lse is not None
    torch.testing.assert_close(got.out.double(), out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.lse.double(), lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_torch_says_of_its_gpu_kernels_what_is_made_of_them(group: int) -> None:
    """Arguments and shapes only: their order, and a log-sum-exp that is laid out by query head and query."""
    q, k, v = (x.to("meta") for x in tensors(group, 64, 48, 48, torch.bfloat16))
    lengths = torch.empty(2, 2, dtype=torch.int32, device="meta")
    for found in (attention._cudnn(q, k, v, 0.1), attention._cuda_ragged(q, k[:, :, :40], v[:, :, :40], 0.1, lengths)):
        assert found.lse is not None
        assert found.out.shape == q.shape
        assert found.lse.shape == q.shape[:3]
        assert found.lse.dtype == torch.float32


def test_lengths_say_what_a_bias_says() -> None:
    q, k, v = tensors(3, 16, 5, 40, torch.float32)
    lengths = torch.tensor([[40, 7], [0, 1]])
    bias = torch.zeros(2, 2, 40).masked_fill(torch.arange(40) >= lengths[..., None], -torch.inf)
    plain = kernels.attend(q, k, v, scale=0.25, bias=bias, need_lse=True)
    again = kernels.attend(q, k, v, scale=0.25, bias=bias, lengths=lengths, need_lse=True)
    assert torch.equal(plain.out, again.out)
    assert plain.lse is not None
    assert again.lse is not None
    assert torch.equal(plain.lse, again.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [2048, 2500, 4096])
def test_a_long_prompt_on_a_gpu_gets_the_log_sum_exp_that_it_has(dtype: torch.dtype, group: int, length: int) -> None:
    """Where cuDNN is taken, and where it is not."""
    q = torch.randn(1, length, 2 * group, 128, device="cuda", dtype=dtype).transpose(1, 2)  # strides as a model's
    k, v = (torch.randn(1, length, 2, 128, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    got = kernels.attend(q, k, v, scale=0.09, causal=True, need_lse=True)
    plain = kernels.attend(q, k, v, scale=0.09, causal=True)
    assert got.lse is not None
    torch.testing.assert_close(got.out, plain.out, atol=2e-2, rtol=2e-2)
    some = torch.tensor([0, 1, 63, 64, 1000, length - 1], device="cuda")
    keys = k.double().repeat_interleave(group, dim=1)
    logits = q[:, :, some].double() @ keys.transpose(-1, -2) * 0.09
    logits = logits.masked_fill(torch.arange(length, device="cuda") > some[:, None], -torch.inf)
    torch.testing.assert_close(got.lse[:, :, some].double(), logits.logsumexp(dim=-1), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_heads_of_unequal_lengths_on_a_gpu_are_attended_to_as_by_the_naive_twin(dtype: torch.dtype, group: int) -> None:
    for dim, entries, queries in itertools.product((64, 80, 128), LENGTHS, (2, 65)):
        q, k, v = (x.cuda() for x in tensors(group, dim, queries, entries, dtype))
        lengths = torch.randint(0, entries + 1, (2, 2), device="cuda")
        absent = torch.arange(entries, device="cuda") >= lengths[..., None]
        bias = torch.zeros(2, 2, entries, device="cuda").masked_fill(absent, -torch.inf)
        k, v = (x.masked_fill(absent[..., None], 1e4) for x in (k, v))  # finite, and never looked at
        twin = naive.attend(q, k, v, scale=0.2, bias=bias)
        got = kernels.attend(q, k, v, scale=0.2, bias=bias, lengths=lengths, need_lse=True)
        torch.testing.assert_close(got.out, twin.out, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(got.lse, twin.lse, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("path", ["causal", "past", "ragged", "verbatim"])
def test_attention_on_a_gpu_is_that_of_the_naive_twin(dtype: torch.dtype, group: int, path: str) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for dim, length, need_lse in itertools.product((16, 64, 80), LENGTHS, (False, True)):
        q, k, v = (x.cuda() for x in tensors(group, dim, length, length, dtype))
        causal, bias = path in ("causal", "verbatim"), None
        if path == "ragged":
            lengths = torch.randint(1, length + 1, (2, 2, 1))
            bias = torch.zeros(2, 2, length).masked_fill(torch.arange(length) >= lengths, -torch.inf).cuda()
        twin = naive.attend(q, k, v, scale=0.2, causal=causal, bias=bias)
        got = kernels.attend(
            q, k, v, scale=0.2, causal=causal, bias=bias, need_lse=need_lse, verbatim=path == "verbatim"
        )
        torch.testing.assert_close(got.out, twin.out, atol=tolerance, rtol=tolerance)
        if need_lse:
            torch.testing.assert_close(got.lse, twin.lse, atol=1e-3, rtol=1e-3)
