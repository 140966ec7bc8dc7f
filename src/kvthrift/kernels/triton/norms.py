"""Log-sum-exps of a few queries over all entries: the entries are cut into runs, a program takes one of them.

Logits live in registers only; what leaves a program is one number a query and run, in base two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.tiles import PRECISION, padded, programs, tiles

_LOG2E = 1.4426950408889634
_LOG2E_CONST = tl.constexpr(_LOG2E)
_LN2_CONST = tl.constexpr(0.6931471805599453)


@triton.jit
def _norms(
    q_ptr, k_ptr, q_position_ptr, k_position_ptr, valid_ptr, bias_ptr, part_ptr,
    scale, queries, entries, run, q_b, q_h, q_t, k_b, k_h, k_t, qp_b, kp_b, kp_h, valid_b, valid_h, bias_b, bias_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(2)
    b, h = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    r, n, d = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, DP)
    inside, in_d = r < GROUP * queries, d < D
    row = (h * GROUP + r // queries) * q_h + (r % queries) * q_t
    q = tl.load(
        q_ptr + b * q_b + row[:, None] + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0
    )  # fmt: skip
    limit = tl.load(q_position_ptr + b * qp_b + r % queries, mask=inside, other=-1).to(tl.int32)
    keys, places = k_ptr + b * k_b + h * k_h, k_position_ptr + b * kp_b + h * kp_h
    valids, biases = valid_ptr + b * valid_b + h * valid_h, bias_ptr + b * bias_b + h * bias_h
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in tl.range(split * run, tl.minimum(split * run + run, entries), N, num_stages=STAGES):
        there = start + n < entries
        at = keys + (start + n).to(tl.int64)[:, None] * k_t + d[None, :]
        k = tl.load(at, mask=there[:, None] & in_d[None, :], other=0.0)
        place = tl.load(places + start + n, mask=there, other=0).to(tl.int32)
        real = tl.load(valids + start + n, mask=there, other=0) != 0
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            logits += tl.load(biases + start + n, mask=there, other=0.0)[None, :] * _LOG2E_CONST
        logits = tl.where(real[None, :] & (place[None, :] <= limit[:, None]), logits, float("-inf"))
        high = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = high
    part = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(part_ptr + (pair * splits + split).to(tl.int64) * (GROUP * queries) + r, part, mask=inside)


@triton.jit
def _joined(part_ptr, lse_ptr, splits, rows, P: tl.constexpr, N: tl.constexpr):
    r, p = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, P)
    at = part_ptr + (tl.program_id(0) * splits + p).to(tl.int64)[:, None] * rows + r[None, :]
    parts = tl.load(at, mask=(p < splits)[:, None] & (r < rows)[None, :], other=float("-inf"))
    high = tl.max(parts, 0)
    base = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.exp2(parts - base[None, :]), 0)
    lse = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")) * _LN2_CONST
    tl.store(lse_ptr + tl.program_id(0) * rows + r, lse, mask=r < rows)


def norms(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, valid: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """See :func:`kvthrift.kernels.observe.window_sums`; ``[B, HG, W]`` float32 natural logarithms."""
    (b, heads, queries, dim), (_, kv_heads, entries, _) = q.shape, k.shape
    group, rows = heads // kv_heads, heads // kv_heads * queries
    tall, step, stages = tiles(dim, q.dtype)
    tall = min(tall, max(16, triton.next_power_of_2(rows)))
    blocks = -(-rows // tall)
    splits = max(1, min(-(-entries // (4 * step)), -(-programs(q.device) // (b * kv_heads * blocks))))
    run = -(-entries // (splits * step)) * step
    splits = -(-entries // run)
    part = torch.empty(b * kv_heads, splits, rows, dtype=torch.float32, device=q.device)
    like = valid if bias is None else bias
    _norms[(splits, blocks, b * kv_heads)](
        q, k, q_positions, k_positions, valid, like, part, scale * _LOG2E, queries, entries, run,
        *q.stride()[:3], *k.stride()[:3], q_positions.stride(0), *k_positions.stride()[:2], *valid.stride()[:2],
        *like.stride()[:2], HEADS=kv_heads, GROUP=group, D=dim, DP=padded(dim), M=tall, N=step,
        HAS_BIAS=bias is not None, PRECISION=PRECISION, STAGES=stages, num_warps=8 if tall == 128 else 4,
    )  # fmt: skip
    lse = torch.empty(b, heads, queries, dtype=torch.float32, device=q.device)
    few = max(1, 4096 // triton.next_power_of_2(splits))
    _joined[(b * kv_heads, -(-rows // few))](part, lse, splits, rows, P=triton.next_power_of_2(splits), N=few)
    return lse
