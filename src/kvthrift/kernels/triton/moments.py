"""Sums over queries of what they were before the rotary embedding, and of their outer products, for any head.

Each program turns a run of one head's queries back and adds them up in float32; the few runs of a head are added
afterwards. Queries are read once, and nothing of their size is written.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.tiles import PRECISION, padded, programs

_WIDEST = 128  # numbers of a head that one program multiplies with as many others


@triton.jit
def _before(at, cos_at, sin_at, inside, use, d, stretch, D: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr):
    turned = d < 2 * HALF
    partner = tl.max_contiguous(tl.multiple_of(tl.where(turned, (d + HALF) % (2 * HALF), d), RUN), RUN)
    held = inside[:, None] & (d < D)[None, :]
    own = tl.load(at + d[None, :], mask=held, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=held & turned[None, :], other=0.0).to(tl.float32)
    angle = tl.max_contiguous(tl.multiple_of(d % HALF, RUN), RUN)[None, :]
    cos = tl.load(cos_at + angle, mask=held & turned[None, :], other=1.0)
    sin = tl.load(sin_at + angle, mask=held & turned[None, :], other=0.0)
    plain = (own * cos + tl.where(d < HALF, 1.0, -1.0)[None, :] * other * sin) * stretch
    return tl.where(use[:, None], plain, 0.0)


@triton.jit
def _moments(
    q_ptr, cos_ptr, sin_ptr, use_ptr, total_ptr, outer_ptr,
    stretch, queries, run, q_b, q_h, q_t, table_b, use_b,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ANGLES: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    across: tl.constexpr = (D + P - 1) // P
    left, right = tl.program_id(1) // across, tl.program_id(1) % across
    pair = tl.program_id(2)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    n, i, j = tl.arange(0, N), left * P + tl.arange(0, P), right * P + tl.arange(0, P)
    total = tl.zeros([P], tl.float32)
    outer = tl.zeros([P, P], tl.float32)
    for start in tl.range(split * run, tl.minimum(split * run + run, queries), N, num_stages=STAGES):
        t = (start + n).to(tl.int64)
        inside = t < queries
        use = tl.load(use_ptr + b * use_b + t, mask=inside, other=0) != 0
        at = q_ptr + b * q_b + head * q_h + t[:, None] * q_t
        cos_at, sin_at = cos_ptr + b * table_b + t[:, None] * ANGLES, sin_ptr + b * table_b + t[:, None] * ANGLES
        x = _before(at, cos_at, sin_at, inside, use, i, stretch, D, HALF, RUN)
        total += tl.sum(x, 0)
        y = x
        if across > 1:
            y = _before(at, cos_at, sin_at, inside, use, j, stretch, D, HALF, RUN)
        kind = q_ptr.dtype.element_ty
        outer = tl.dot(tl.trans(x.to(kind)), y.to(kind), outer, input_precision=PRECISION)
    place = (pair * splits + split).to(tl.int64)
    tl.store(outer_ptr + place * (D * D) + i[:, None] * D + j[None, :], outer, mask=(i < D)[:, None] & (j < D)[None, :])
    if right == 0:
        tl.store(total_ptr + place * D + i, total, mask=i < D)


def moments(q: Tensor, cos: Tensor, sin: Tensor, use: Tensor, stretch: float) -> tuple[Tensor, Tensor]:
    """See :func:`kvthrift.kernels.expected.query_moments`; ``cos``, ``sin`` ``[B, Q, R/2]`` of the angles to undo."""
    b, heads, queries, dim = q.shape
    half = cos.shape[-1]
    wide = min(padded(dim), _WIDEST)
    across = -(-dim // wide)
    step = 32 if q.element_size() == 2 else 16
    splits = max(1, min(-(-queries // (8 * step)), -(-programs(q.device) // (2 * b * heads * across**2))))
    run = -(-queries // (splits * step)) * step
    splits = -(-queries // run)
    total = torch.empty(b, heads, splits, dim, dtype=torch.float32, device=q.device)
    outer = torch.empty(b, heads, splits, dim, dim, dtype=torch.float32, device=q.device)
    _moments[(splits, across**2, b * heads)](
        q, cos, sin, use, total, outer, stretch, queries, run, *q.stride()[:3], cos.stride(0), use.stride(0),
        HEADS=heads, D=dim, HALF=half, ANGLES=half, RUN=gcd(half, 16), P=wide, N=step, PRECISION=PRECISION,
        STAGES=2 if across == 1 else 1, num_warps=8 if wide == _WIDEST else 4,
        maxnreg=128 if across == 1 and q.element_size() == 2 else None,  # so that a multiprocessor takes two programs
    )  # fmt: skip
    return total.sum(dim=2), outer.sum(dim=2)
