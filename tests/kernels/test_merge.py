"""Parts of one attention, joined, are that attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import AttentionOutput
from kvthrift.kernels import naive


def nothing(like: AttentionOutput) -> AttentionOutput:
    assert like.lse is not None
    return AttentionOutput(torch.zeros_like(like.out), torch.full_like(like.lse, -torch.inf))


def tensors(seed: int, entries: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 6, 3, 16, generator=rng) * 3  # peaked, so that parts weigh very differently
    k, v = torch.randn(2, 2, 2, entries, 16, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.lists(st.integers(0, 90), max_size=5), st.data())
def test_attention_over_parts_joins_to_attention_over_all(
    seed: int, entries: int, cuts: list[int], data: st.DataObject
) -> None:
    q, k, v = tensors(seed, entries)
    whole = naive.attend(q, k, v, scale=0.5)
    edges = [0, *sorted(min(cut, entries) for cut in cuts), entries]
    parts = [
        kernels.attend(q, k[:, :, a:b], v[:, :, a:b], scale=0.5, need_lse=True) if b > a else nothing(whole)
        for a, b in pairwise(edges)
    ]
    joined = kernels.merge(data.draw(st.permutations(parts)))
    assert joined.lse is not None
    torch.testing.assert_close(joined.out, whole.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(joined.lse, whole.lse, atol=2e-5, rtol=2e-5)


def test_past_without_a_mask_and_present_with_one_join_to_causal_attention() -> None:
    q, k, v = (torch.randn(1, h, 70, 16) for h in (6, 2, 2))
    whole = naive.attend(q, k, v, scale=0.25, causal=True)
    past = kernels.attend(q[:, :, 50:], k[:, :, :50], v[:, :, :50], scale=0.25, need_lse=True)
    own = kernels.attend(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], scale=0.25, causal=True, need_lse=True)
    torch.testing.assert_close(kernels.merge((past, own)).out, whole.out[:, :, 50:], atol=1e-5, rtol=1e-5)


def test_parts_that_all_see_nothing_join_to_nothing() -> None:
    q, k, v = tensors(0, 4)
    empty = nothing(naive.attend(q, k, v, scale=1.0))
    joined = kernels.merge((empty, empty))
    assert joined.lse is not None
    assert (joined.out == 0).all()
    assert (joined.lse == -torch.inf).all()


def test_half_precision_parts_are_joined_in_float32() -> None:
    q, k, v = tensors(1, 64, torch.bfloat16)
    parts = [
        kernels.attend(q, k[:, :, n : n + 4], v[:, :, n : n + 4], scale=0.3, need_lse=True) for n in range(0, 64, 4)
    ]
    joined = kernels.merge(parts)
    whole = naive.attend(q.float(), k.float(), v.float(), scale=0.3)
    assert joined.out.dtype == torch.bfloat16
    torch.testing.assert_close(joined.out.float(), whole.out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(joined.lse, whole.lse, atol=1e-2, rtol=1e-3)


def test_one_part_needs_no_lse_and_two_do() -> None:
    alone = AttentionOutput(torch.zeros(1, 1, 1, 2))
    assert kernels.merge([alone]) is alone
    with pytest.raises(ValueError, match="log-sum-exp"):
        kernels.merge([alone, alone])
