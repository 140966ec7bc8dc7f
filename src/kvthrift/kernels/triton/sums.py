"""Attention that entries receive, summed over queries: a program owns a block of entries and goes through the queries.

The log-sum-exp of every query is known, so a weight is one exponential and nothing has to be normalised afterwards. The
queries are the columns of the product, so that the sum over them stays within a few threads. Blocks of queries that see
none of the program's entries are not looked at; those that see all of them need no mask. No atomics: the same sums
every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kvthrift.kernels.triton.tiles import PRECISION, padded, tiles

_LOG2E = 1.4426950408889634
_LOG2E_CONST = tl.constexpr(_LOG2E)
_FAR = 2**31 - 1
_FAR_CONST = tl.constexpr(_FAR)


@triton.jit
def seeing(high_ptr, low_ptr, blocks, nearest, farthest, CHUNK: tl.constexpr):
    """The first block of queries that sees an entry at ``nearest``, the first from which on all see those up to
    ``farthest``, and the end; of each block the highest and the lowest position are given."""
    first, clear, stop = blocks, 0, 0
    for base in range(0, blocks, CHUNK):
        i = base + tl.arange(0, CHUNK)
        high = tl.load(high_ptr + i, mask=i < blocks, other=-1)
        low = tl.load(low_ptr + i, mask=i < blocks, other=_FAR_CONST)
        first = tl.minimum(first, tl.min(tl.where(high >= nearest, i, blocks), 0))
        stop = tl.maximum(stop, tl.max(tl.where(high >= nearest, i + 1, 0), 0))
        clear = tl.maximum(clear, tl.max(tl.where(low < farthest, i + 1, 0), 0))
    return first, tl.minimum(tl.maximum(first, clear), stop), stop


@triton.jit
def _sums(
    q_ptr, k_ptr, norm_ptr, q_position_ptr, k_position_ptr, valid_ptr, bias_ptr, high_ptr, low_ptr, out_ptr,
    scale, queries, entries, blocks, buffer, q_b, q_h, q_t, k_b, k_h, k_t, norm_b, norm_h, qp_b, kp_b, kp_h,
    valid_b, valid_h, bias_b, bias_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, POWER: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, BOUNDS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1) // (GROUP // EACH)
    b, h = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    n, w, d = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N), tl.arange(0, W), tl.arange(0, DP)
    there, in_d = n < entries, d < D
    place = tl.load(k_position_ptr + b * kp_b + h * kp_h + n, mask=there, other=0).to(tl.int32)
    real = tl.load(valid_ptr + b * valid_b + h * valid_h + n, mask=there, other=0) != 0
    k = tl.load(  # what is not real counts as nothing, and cannot overflow
        k_ptr + b * k_b + h * k_h + n[:, None] * k_t + d[None, :], mask=real[:, None] & in_d[None, :], other=0.0
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + b * bias_b + h * bias_h + n, mask=there, other=0.0) * (_LOG2E_CONST * POWER)
    first, clear, stop = 0, blocks, blocks
    if BOUNDS:
        nearest = tl.min(tl.where(real, place, _FAR_CONST), 0) + tl.where(tl.max(real.to(tl.int32), 0) > 0, buffer, 0)
        farthest = tl.max(tl.where(real, place, -1), 0) + buffer
        first, clear, stop = seeing(high_ptr + b * blocks, low_ptr + b * blocks, blocks, nearest, farthest, CHUNK)
    for each in range(EACH):
        head = h * GROUP + (tl.program_id(1) % (GROUP // EACH)) * EACH + each
        rows, norms = q_ptr + b * q_b + head * q_h, norm_ptr + b * norm_b + head * norm_h
        total = tl.zeros([N], tl.float32)
        for block in tl.range(first, clear, num_stages=STAGES):
            r = (block * W + w).to(tl.int64)
            inside = r < queries
            q = tl.load(rows + r[:, None] * q_t + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
            if BOUNDS:
                norm = tl.load(norms + r)
            else:
                norm = tl.load(norms + r, mask=inside, other=0.0) * (_LOG2E_CONST * POWER)
            limit = tl.load(q_position_ptr + b * qp_b + r, mask=inside, other=-1).to(tl.int32) - buffer
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - norm[None, :]
            if HAS_BIAS:
                logits += bias[:, None]
            logits = tl.where(place[:, None] <= limit[None, :], logits, float("-inf"))
            total += tl.sum(tl.exp2(logits), 1)
        for block in tl.range(clear, stop, num_stages=STAGES):
            r = (block * W + w).to(tl.int64)
            at = rows + tl.minimum(r, queries - 1)[:, None] * q_t + d[None, :]  # behind the last, norms are infinite
            q = tl.load(at) if D == DP else tl.load(at, mask=in_d[None, :], other=0.0)
            norm = tl.load(norms + r)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - norm[None, :]
            if HAS_BIAS:
                logits += bias[:, None]
            total += tl.sum(tl.exp2(logits), 1)
        out = out_ptr + (b * (HEADS * GROUP) + head) * entries + n
        tl.store(out, tl.where(real, total, 0.0), mask=there)


def sums(
    q: Tensor, k: Tensor, lse: Tensor, q_positions: Tensor, k_positions: Tensor, valid: Tensor, scale: float,
    bias: Tensor | None, *, power: int = 1, buffer: int = 0, together: bool = False,
    tile: tuple[int, int] = (0, 0), warps: int = 0, stages: int = 0,
) -> Tensor:  # fmt: skip
    """See :func:`kvthrift.kernels.observe.power_sums`; ``[B, H, G, T]`` float32.

    Args:
        together: a program takes all query heads of a group, which reads each key once: right for few queries.
        tile: entries and queries of a block, ``warps``, ``stages``: for measuring.
    """
    (b, heads, queries, dim), (_, kv_heads, entries, _) = q.shape, k.shape
    group = heads // kv_heads
    tall, across, ahead = tiles(dim, q.dtype)
    tall, across = tile if tile[0] else (tall, across)
    across = min(across, max(16, triton.next_power_of_2(queries)))
    blocks = -(-queries // across)
    bounds = blocks > 1
    high, low, norms = q_positions, q_positions, lse
    if bounds:
        missing = blocks * across - queries
        norms = F.pad(lse * (_LOG2E * power), (0, missing), value=float("inf"))
        high = F.pad(q_positions, (0, missing), value=-1).view(b, blocks, across).amax(dim=-1).int()
        low = F.pad(q_positions, (0, missing), value=_FAR).view(b, blocks, across).amin(dim=-1).int()
    out = torch.empty(b, kv_heads, group, entries, dtype=torch.float32, device=q.device)
    like, each = valid if bias is None else bias, group if together else 1
    _sums[(-(-entries // tall), b * heads // each)](
        q, k, norms, q_positions, k_positions, valid, like, high, low, out,
        scale * _LOG2E * power, queries, entries, blocks, buffer, *q.stride()[:3], *k.stride()[:3], *norms.stride()[:2],
        q_positions.stride(0), *k_positions.stride()[:2], *valid.stride()[:2], *like.stride()[:2],
        HEADS=kv_heads, GROUP=group, EACH=each, POWER=power, D=dim, DP=padded(dim), N=tall, W=across, BOUNDS=bounds,
        CHUNK=min(1024, max(16, triton.next_power_of_2(blocks))), HAS_BIAS=bias is not None,
        PRECISION=PRECISION, STAGES=stages or ahead, num_warps=warps or (8 if tall >= 128 else 4),
    )  # fmt: skip
    return out
