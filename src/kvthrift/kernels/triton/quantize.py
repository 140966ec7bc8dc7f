"""Queries and keys in 8 bits, for sums of attention that need no more.

A softmax does not change when every logit of a query moves alike, nor does a sum over queries when an entry's logits do
and the sum is set right by a factor. So keys lose their mean over the entries, whose product with a query goes to that
query's norm, and queries lose theirs over the queries, whose product with a key goes to that entry's factor; what is
left is smaller, and its rounding has no common direction. Runs of channels are turned by a Hadamard matrix whose rows
change signs, so that neither a channel that stands out nor all of them alike end up in few. A query has a scale of its
own, keys share one in blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.naive_int8 import KEY_BLOCK, RUN, in_reach, mean_of

_LOG2E = 1.4426950408889634
_LOG2E_CONST = tl.constexpr(_LOG2E)
_ROWS = 32  # of vectors a program
_NEAREST = tl.constexpr(12582912.0)  # numbers far below it lose their fraction when it is added: ties go to even


class Coarse(NamedTuple):
    """Queries and keys in 8 bits, and what makes logits of their products.

    The logit of query i and entry n less the query's norm, in powers of two, is
    ``factors_i * steps_n * (queries_i . keys_n) + norms_i + shifts_n``.

    Attributes:
        queries: ``[B, HG, rows, DP]`` int8; rows behind the last are zero.
        factors, norms: ``[B, HG, rows]`` float32; the norm of a query that is absent or sees nothing is ``-inf``.
        keys: ``[B, H, T and more, DP]`` int8; those behind the last are zero.
        steps: ``[B, H, T and more]`` float32, or fewer: one for each block of entries.
        shifts: ``[B, HG, T]`` float32.
    """

    queries: Tensor
    factors: Tensor
    norms: Tensor
    keys: Tensor
    steps: Tensor
    shifts: Tensor


@triton.jit
def _row_sums(
    x_ptr, use_ptr, out_ptr, rows, x_b, x_h, x_t, use_b, use_h,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    d = tl.arange(0, DP)
    total = tl.zeros([N, DP], tl.float32)
    for step in range(STEPS):
        n = (tl.program_id(0) * STEPS + step).to(tl.int64) * N + tl.arange(0, N)
        use = tl.load(use_ptr + b * use_b + h * use_h + n, mask=n < rows, other=0) != 0
        at = x_ptr + b * x_b + h * x_h + n[:, None] * x_t + d[None, :]
        total += tl.load(at, mask=use[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * DP + d, tl.sum(total, 0))


@triton.jit
def _signs(RUN: tl.constexpr):
    """The twin's ``turn``, but for its factor."""
    i = tl.arange(0, RUN)
    odd = (i[:, None] & i[None, :]) ^ (i & (i >> 1) & 0b010101)[:, None]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float32)


@triton.jit
def _turned(x, signs, ROWS: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr):
    """Every run of channels times ``signs``; a number's first 11 bits and its next 11 by themselves."""
    x = tl.reshape(x, [ROWS * DP // RUN, RUN])
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    runs = tl.dot(high, signs, tl.dot(x - high, signs, input_precision="tf32"), input_precision="tf32")
    return tl.reshape(runs, [ROWS, DP])


@triton.jit
def _nearest(x):
    return ((x + _NEAREST) - _NEAREST).to(tl.int8)


@triton.jit
def _coarse_keys(
    k_ptr, valid_ptr, mean_ptr, middle_ptr, out_ptr, step_ptr, shift_ptr, scale, entries, k_b, k_h, k_t, valid_b,
    valid_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    n, d = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N), tl.arange(0, DP)
    real = tl.load(valid_ptr + b * valid_b + h * valid_h + n, mask=n < entries, other=0) != 0
    use = real[:, None] & (d < D)[None, :]
    x = tl.load(k_ptr + b * k_b + h * k_h + n[:, None] * k_t + d[None, :], mask=use, other=0.0).to(tl.float32)
    x = tl.where(use, x - tl.load(mean_ptr + pair * DP + d)[None, :], 0.0)
    for each in range(GROUP):
        head = pair * GROUP + each
        shift = tl.sum(x * tl.load(middle_ptr + head * DP + d)[None, :], 1) * scale
        tl.store(shift_ptr + head * entries + n, shift, mask=n < entries)
    x = _turned(x, _signs(RUN), N, DP, RUN)
    most = tl.max(tl.reshape(tl.max(tl.abs(x), 1), [N // SHARE, SHARE]), 1)
    levels = tl.reshape(tl.broadcast_to((127.0 / tl.maximum(most, 1e-30))[:, None], [N // SHARE, SHARE]), [N])
    at = pair * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr + (at * N + tl.arange(0, N))[:, None] * DP + d[None, :], _nearest(x * levels[:, None]))
    tl.store(step_ptr + at * (N // SHARE) + tl.arange(0, N // SHARE), most / 127)


@triton.jit
def _coarse_queries(
    q_ptr, lse_ptr, q_position_ptr, mean_ptr, middle_ptr, out_ptr, factor_ptr, norm_ptr, scale, queries, power,
    q_b, q_h, q_t, lse_b, lse_h, qp_b,
    rows, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    RUN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // (HEADS * GROUP), head % (HEADS * GROUP)
    d, signs = tl.arange(0, DP), _signs(RUN)
    mean = tl.load(mean_ptr + head // GROUP * DP + d)[None, :]
    middle = tl.load(middle_ptr + head * DP + d)[None, :]
    for block in tl.range(BLOCKS, num_stages=1):
        n = (tl.program_id(0) * BLOCKS + block).to(tl.int64) * N + tl.arange(0, N)
        lse = tl.load(lse_ptr + b * lse_b + h * lse_h + n, mask=n < queries, other=float("-inf"))
        there = tl.load(q_position_ptr + b * qp_b + n, mask=n < queries, other=-1) >= 0
        there &= lse != float("-inf")
        use = there[:, None] & (d < D)[None, :]
        x = tl.load(q_ptr + b * q_b + h * q_h + n[:, None] * q_t + d[None, :], mask=use, other=0.0).to(tl.float32)
        norm = tl.sum(x * mean, 1) * scale - lse * (_LOG2E_CONST * power)
        x = _turned(tl.where(use, x - middle, 0.0), signs, N, DP, RUN)
        most = tl.max(tl.abs(x), 1)
        x = _nearest(x * (127.0 / tl.maximum(most, 1e-30))[:, None])
        at, made = head * rows + n, n < rows
        tl.store(out_ptr + at[:, None] * DP + d[None, :], x, mask=made[:, None])
        tl.store(factor_ptr + at, most * (scale / (127 * RUN)), mask=made)
        tl.store(norm_ptr + at, tl.where(there, norm, float("-inf")), mask=made)


def means(x: Tensor, use: Tensor, width: int) -> Tensor:
    """Mean ``[B, H, width]`` float32 of the rows of ``x [B, H, N, D]`` in ``use [B, H, N]``; zeros behind D."""
    b, h, rows, dim = x.shape
    steps, size = 16, 64 if width <= 128 else 32
    parts = -(-rows // (steps * size))
    sums = torch.empty(b, h, parts, width, device=x.device)
    _row_sums[(parts, b * h)](
        x, use, sums, rows, *x.stride()[:3], *use.stride()[:2], HEADS=h, D=dim, DP=width, N=size, STEPS=steps,
        num_warps=8,
    )  # fmt: skip
    return mean_of(sums.sum(dim=2), use)


def coarse(
    q: Tensor, k: Tensor, lse: Tensor, q_positions: Tensor, valid: Tensor, scale: float, *, power: int, rows: int,
    share: int = KEY_BLOCK,
) -> Coarse:  # fmt: skip
    """See :class:`Coarse`; arguments as for :func:`kvthrift.kernels.observe.power_sums`.

    Args:
        rows: of queries, a multiple of 32.
        share: entries that have one scale, 32 or a power of two below.
    """
    (b, heads, queries, dim), (_, kv_heads, entries, _) = q.shape, k.shape
    group, width, device = heads // kv_heads, max(32, triton.next_power_of_2(dim)), q.device
    blocks, run, scale = -(-entries // _ROWS), min(width, RUN), scale * _LOG2E * power
    mean = means(k, valid, width)
    middle = means(q, (q_positions >= 0)[:, None].expand(b, heads, queries), width)
    keys = torch.empty(b, kv_heads, blocks * _ROWS, width, dtype=torch.int8, device=device)
    steps = torch.empty(b, kv_heads, blocks * _ROWS // share, device=device)
    shifts = torch.empty(b, heads, entries, device=device)
    sizes = {"GROUP": group, "D": dim, "DP": width, "RUN": run, "N": _ROWS, "num_warps": 4}
    _coarse_keys[(blocks, b * kv_heads)](
        k, valid, mean, middle, keys, steps, shifts, scale, entries, *k.stride()[:3], *valid.stride()[:2],
        HEADS=kv_heads, SHARE=share, **sizes,
    )  # fmt: skip
    part, centre = in_reach(shifts)
    middle, shifts = middle * part, shifts.sub_(centre).mul_(part)
    vectors = torch.empty(b, heads, rows, width, dtype=torch.int8, device=device)
    factors, norms = (torch.empty(b, heads, rows, device=device) for _ in range(2))
    many = 16 if rows >= 4096 else 1  # blocks of a program, which makes the signs once
    _coarse_queries[(triton.cdiv(rows, many * _ROWS), b * heads)](
        q, lse, q_positions, mean, middle, vectors, factors, norms, scale, queries, power, *q.stride()[:3],
        *lse.stride()[:2], q_positions.stride(0), rows, HEADS=kv_heads, BLOCKS=many, **sizes,
    )  # fmt: skip
    return Coarse(vectors, factors, norms.add_(centre * part), keys, steps, shifts)
