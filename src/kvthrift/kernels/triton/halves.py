"""Query moments where the rotary embedding turns whole heads of half precision: the two halves of a head are one pair.

Every number of a query is read once and turned back with its partner in registers. The second moments are symmetric,
so three products of halves make them. A head's queries are cut into runs, a program takes one of them, and a second
kernel adds up what the runs left: no atomics, the same sums every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.tiles import padded, programs

_WIDEST = 64  # numbers of half a head
_STEP = 64  # queries of a block
_ROWS = 16  # rows of a matrix that a program adds up
_REGISTERS = 128  # a thread, so that a multiprocessor takes two programs


def takes(q: Tensor, half: int) -> bool:
    """Whether heads are small enough, and turned as a whole."""
    return q.element_size() == 2 and 2 * half == q.shape[-1] and padded(half) <= _WIDEST


@triton.jit
def _runs(
    q_ptr, cos_ptr, sin_ptr, use_ptr, total_ptr, outer_ptr, queries, run, q_b, q_h, q_t, table_b, use_b,
    HEADS: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, splits, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    b, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    n, i = tl.arange(0, N), tl.arange(0, P)
    queries_at, stop = q_ptr + b * q_b + head * q_h, tl.minimum(split * run + run, queries)
    low_sum, high_sum = tl.zeros([N, P], tl.float32), tl.zeros([N, P], tl.float32)
    low, cross, high = tl.zeros([P, P], tl.float32), tl.zeros([P, P], tl.float32), tl.zeros([P, P], tl.float32)
    one, two = tl.zeros([N, P], q_ptr.dtype.element_ty), tl.zeros([N, P], q_ptr.dtype.element_ty)
    for start in tl.range(split * run, stop + N, N, num_stages=STAGES):
        low = tl.dot(tl.trans(one), one, low)  # of the block before: only what a loop carries is read from memory
        cross = tl.dot(tl.trans(one), two, cross)
        high = tl.dot(tl.trans(two), two, high)
        t = (start + n).to(tl.int64)
        held = (t < stop)[:, None] & (i < HALF)[None, :]
        at, angle = queries_at + t[:, None] * q_t + i[None, :], b * table_b + t[:, None] * HALF + i[None, :]
        x = tl.load(at, mask=held, other=0.0).to(tl.float32)
        y = tl.load(at + HALF, mask=held, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle, mask=held, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=held, other=0.0).to(tl.float32)
        use = (tl.load(use_ptr + b * use_b + t, mask=t < stop, other=0) != 0)[:, None]
        before, after = tl.where(use, x * cos + y * sin, 0.0), tl.where(use, y * cos - x * sin, 0.0)
        low_sum += before
        high_sum += after
        one, two = before.to(q_ptr.dtype.element_ty), after.to(q_ptr.dtype.element_ty)
    place = (pair * splits + split).to(tl.int64)
    outer = outer_ptr + place * (3 * P * P) + tl.arange(0, P)[:, None] * P + i[None, :]
    tl.store(outer, low)
    tl.store(outer + P * P, cross)
    tl.store(outer + 2 * P * P, high)
    tl.store(total_ptr + place * (2 * P) + i, tl.sum(low_sum, 0))
    tl.store(total_ptr + place * (2 * P) + P + i, tl.sum(high_sum, 0))


@triton.jit
def _added(
    part_ptr, sum_ptr, total_ptr, outer_ptr, stretch, splits,
    HALF: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)  # of a matrix: low, cross or high
    r, i = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
    matrix = tl.zeros([ROWS, P], tl.float32)
    for split in range(splits):
        at = (pair * splits + split) * (3 * P * P) + block * (P * P) + r[:, None] * P + i[None, :]
        matrix += tl.load(part_ptr + at)
    matrix *= stretch * stretch
    rows, columns = r + tl.where(block == 2, HALF, 0), i + tl.where(block == 0, 0, HALF)
    real = (r < HALF)[:, None] & (i < HALF)[None, :]
    out = outer_ptr + pair * (4 * HALF * HALF)
    tl.store(out + rows[:, None] * (2 * HALF) + columns[None, :], matrix, mask=real)
    if block == 1:
        tl.store(out + columns[None, :] * (2 * HALF) + rows[:, None], matrix, mask=real)
    elif tl.program_id(2) == 0:
        total = tl.zeros([P], tl.float32)
        for split in range(splits):
            total += tl.load(sum_ptr + (pair * splits + split) * (2 * P) + (block // 2) * P + i)
        tl.store(total_ptr + pair * (2 * HALF) + tl.where(block == 2, HALF, 0) + i, total * stretch, mask=i < HALF)


def moments(
    q: Tensor, cos: Tensor, sin: Tensor, use: Tensor, stretch: float,
    *, step: int = _STEP, warps: int = 8, stages: int = 3, registers: int = _REGISTERS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kvthrift.kernels.expected.query_moments`; for what :func:`takes` says.

    Args:
        cos, sin: ``[B, Q, D/2]`` float16 of the angles to undo.
        step: queries of a block, ``warps``, ``stages``, ``registers``: for measuring.
    """
    (b, heads, queries, dim), half = q.shape, cos.shape[-1]
    wide = padded(half)
    splits = max(1, min(-(-queries // (4 * step)), programs(q.device) // (b * heads)))
    run = -(-queries // (splits * step)) * step
    splits = -(-queries // run)
    parts = torch.empty(b * heads, splits, 3, wide, wide, dtype=torch.float32, device=q.device)
    sums = torch.empty(b * heads, splits, 2, wide, dtype=torch.float32, device=q.device)
    _runs[(splits, b * heads)](
        q, cos, sin, use, sums, parts, queries, run, *q.stride()[:3], cos.stride(0), use.stride(0),
        HEADS=heads, HALF=half, P=wide, N=step, STAGES=stages, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    total = torch.empty(b, heads, dim, dtype=torch.float32, device=q.device)
    outer = torch.empty(b, heads, dim, dim, dtype=torch.float32, device=q.device)
    _added[(b * heads, 3, wide // _ROWS)](
        parts, sums, total, outer, stretch, splits, HALF=half, P=wide, ROWS=_ROWS, num_warps=4
    )
    return total, outer
