"""Attention that entries receive, summed over queries, by products in 8 bits.

As in ``sums.py`` a program owns a block of entries and goes through the queries. Here queries are the rows of the
product, so that what turns it into a logit is a thread's own two numbers, and rows are added up within a thread as far
as that goes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kvthrift.kernels.naive_int8 import KEY_BLOCK
from kvthrift.kernels.triton.quantize import coarse
from kvthrift.kernels.triton.sums import seeing

_LOG2E = 1.4426950408889634
_FAR = 2**31 - 1
_FAR_CONST = tl.constexpr(_FAR)


@triton.jit
def _weights(
    rows, factors, norms, keys, steps, block, W: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Logits ``[W, N]`` of a block of queries less their norms, in powers of two and without the entries' shifts."""
    r = block * W + tl.arange(0, W)
    q = tl.load(rows + r.to(tl.int64)[:, None] * DP + tl.arange(0, DP)[None, :])
    factor = tl.load(factors + r)[:, None] * steps[None, :]  # [W, N / SHARE]
    norm = tl.load(norms + r)[:, None]
    product = tl.dot(q, tl.trans(keys), out_dtype=tl.int32)
    number = tl.reshape(product.to(tl.float32), [W, N // SHARE, SHARE])
    return tl.reshape(number * factor[:, :, None] + tl.broadcast_to(norm, [W, N // SHARE])[:, :, None], [W, N])


@triton.jit
def _sums_int8(
    q_ptr, factor_ptr, norm_ptr, k_ptr, step_ptr, shift_ptr, limit_ptr, k_position_ptr, valid_ptr, bias_ptr, high_ptr,
    low_ptr, out_ptr, stretch, entries, held, blocks, buffer, kp_b, kp_h, valid_b, valid_h, bias_b, bias_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, SHARE: tl.constexpr,
    CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    b, pair, h = row // (HEADS * GROUP), row // GROUP, row // GROUP % HEADS
    n = tl.program_id(0) * N + tl.arange(0, N)
    there = n < entries
    places, valid = k_position_ptr + b * kp_b + h * kp_h, valid_ptr + b * valid_b + h * valid_h
    place = tl.load(places + n, mask=there, other=0).to(tl.int32)
    real = tl.load(valid + n, mask=there, other=0) != 0
    nearest = tl.min(tl.where(real, place, _FAR_CONST), 0) + tl.where(tl.max(real.to(tl.int32), 0) > 0, buffer, 0)
    farthest = tl.max(tl.where(real, place, -1), 0) + buffer
    first, clear, stop = seeing(high_ptr + b * blocks, low_ptr + b * blocks, blocks, nearest, farthest, CHUNK)
    d, part = tl.arange(0, DP), tl.program_id(0) * (N // SHARE) + tl.arange(0, N // SHARE)
    keys = tl.load(k_ptr + (pair * held + n)[:, None] * DP + d[None, :], mask=(n < held)[:, None], other=0)
    steps = tl.load(step_ptr + pair * (held // SHARE) + part, mask=part < held // SHARE, other=0.0)
    before, limits = row * blocks * W, limit_ptr + b * blocks * W
    rows, factors, norms = q_ptr + before * DP, factor_ptr + before, norm_ptr + before
    total = tl.zeros([W // 16, 8, N], tl.float32)
    for block in tl.range(first, clear, num_stages=STAGES):
        x = _weights(rows, factors, norms, keys, steps, block, W, DP, N, SHARE)
        limit = tl.load(limits + block * W + tl.arange(0, W)) - buffer
        near = tl.load(places + tl.minimum(n, entries - 1), volatile=True).to(tl.int32)  # rather than hold them
        x = tl.exp2(tl.where(near[None, :] <= limit[:, None], x, float("-inf")))
        total += tl.sum(tl.reshape(x, [W // 16, 2, 8, N]), 1)
    for block in tl.range(clear, stop, num_stages=STAGES):
        x = tl.exp2(_weights(rows, factors, norms, keys, steps, block, W, DP, N, SHARE))
        total += tl.sum(tl.reshape(x, [W // 16, 2, 8, N]), 1)
    n = tl.program_id(0) * N + tl.arange(0, N)
    there = n < entries
    more = tl.load(shift_ptr + row * entries + n, mask=there, other=0.0)
    if HAS_BIAS:
        more += tl.load(bias_ptr + b * bias_b + h * bias_h + n, mask=there, other=0.0) * stretch
    real = tl.load(valid + n, mask=there, other=0, volatile=True) != 0
    received = tl.sum(tl.sum(total, 0), 0) * tl.exp2(more)
    tl.store(out_ptr + row * entries + n, tl.where(real, received, 0.0), mask=there)


def sums_int8(
    q: Tensor, k: Tensor, lse: Tensor, q_positions: Tensor, k_positions: Tensor, valid: Tensor, scale: float,
    bias: Tensor | None, *, power: int = 1, buffer: int = 0, tile: tuple[int, int] = (0, 0), warps: int = 0,
    stages: int = 0, registers: int | None = 128, share: int = KEY_BLOCK,
) -> Tensor:  # fmt: skip
    """See :func:`kvthrift.kernels.observe.power_sums`; ``[B, H, G, T]`` float32.

    Args:
        tile: entries and queries of a block, ``warps``, ``stages``, ``registers`` of a thread (128 fill a
            multiprocessor; None for as many as there had better be), entries that ``share`` a scale: for measuring.
    """
    (b, heads, queries, _), (_, kv_heads, entries, _) = q.shape, k.shape
    tall, across = tile if tile[0] else (128, 64)
    blocks = -(-queries // across)
    missing = blocks * across - queries
    limits = F.pad(q_positions, (0, missing), value=-1).int()
    high = limits.view(b, blocks, across).amax(dim=-1)
    low = F.pad(q_positions, (0, missing), value=_FAR).view(b, blocks, across).amin(dim=-1).int()
    made = coarse(q, k, lse, q_positions, valid, scale, power=power, rows=blocks * across, share=share)
    out = torch.empty(b, kv_heads, heads // kv_heads, entries, dtype=torch.float32, device=q.device)
    like = valid if bias is None else bias
    sizes = {"maxnreg": registers} if registers else {}
    _sums_int8[(-(-entries // tall), b * heads)](
        made.queries, made.factors, made.norms, made.keys, made.steps, made.shifts, limits, k_positions, valid, like,
        high, low, out, _LOG2E * power, entries, made.keys.shape[2], blocks, buffer, *k_positions.stride()[:2],
        *valid.stride()[:2], *like.stride()[:2],
        HEADS=kv_heads, GROUP=heads // kv_heads, DP=made.queries.shape[-1], N=tall, W=across,
        SHARE=share, CHUNK=min(1024, max(16, triton.next_power_of_2(blocks))),
        HAS_BIAS=bias is not None, STAGES=stages or 3, num_warps=warps or 4, **sizes,
    )  # fmt: skip
    return out
