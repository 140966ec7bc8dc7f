"""What a warp does with one page of 4 bits, or with a row's last page; see ``read_int4.py``. Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvthrift.kernels.triton.fragments import (
    LEFT,
    LEFT2,
    MIXED,
    MMA,
    PRODUCTS,
    RIGHT,
    RIGHT2,
    TOKENS,
    UNITS,
    by_entry,
    by_token,
    columns,
    each,
    everywhere,
    key_levels,
    levels,
    turned,
    unmixed,
)

ROOM = gl.constexpr(9.0)  # exponents that the largest product of a weight and a scale has, when the maximum is raised
LEAST = gl.constexpr(2.0**24)  # levels are read as float16 of their number times the least one
_SLACK = gl.constexpr(5.0)  # exponents that a product may gain until the maximum is raised: less than float16 has left


@gluon.jit
def queries_of(q_ptr, row, QUERIES: gl.constexpr):
    """Right operands ``[128, 8]``: a row's queries, at most 1, and what planes are multiplied with; what both lack."""
    d = gl.arange(0, 128, gl.SliceLayout(1, RIGHT))[:, None]
    m = gl.arange(0, 8, gl.SliceLayout(0, RIGHT))[None, :]
    q = gl.load(q_ptr + row * QUERIES * 128 + (m * 128 + d), mask=(m < QUERIES) & (d < 128), other=0.0).to(gl.float32)
    most = gl.max(gl.max(gl.abs(q), 0), 0)
    lifted = gl.exp2(gl.where(most > 0, gl.ceil(gl.log2(most)), 0.0))
    q = q / lifted
    return q.to(gl.float16), gl.where(d // 32 % 2 == 1, q / MIXED, q).to(gl.float16), lifted


@gluon.jit
def begin(q_ptr, tail_k_ptr, tail_v_ptr, row, there, scale, QUERIES: gl.constexpr):
    """What a row's last page comes to, of which ``there`` entries are there; it is as the model gave it."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    at = gl.arange(0, 64, gl.SliceLayout(1, LINES))[:, None] * 128 + gl.arange(0, 32, gl.SliceLayout(0, LINES))[None, :]
    k_at = tail_k_ptr + row * 8192
    keys0, keys1 = gl.load(k_at + at), gl.load(k_at + (32 + at))  # all on their way before any is worked on
    keys2, keys3 = gl.load(k_at + (64 + at)), gl.load(k_at + (96 + at))
    d = gl.arange(0, 32, gl.SliceLayout(1, RIGHT2))[:, None]
    m = gl.arange(0, 8, gl.SliceLayout(0, RIGHT2))[None, :]
    q_at, here = q_ptr + row * QUERIES * 128 + (m * 128 + d), (m < QUERIES) & (d < 32)
    logits = mma_v2(
        gl.convert_layout(keys0, LEFT2), gl.load(q_at, mask=here, other=0.0), gl.zeros([64, 8], gl.float32, MMA)
    )
    logits = mma_v2(gl.convert_layout(keys1, LEFT2), gl.load(q_at + 32, mask=here, other=0.0), logits)
    logits = mma_v2(gl.convert_layout(keys2, LEFT2), gl.load(q_at + 64, mask=here, other=0.0), logits)
    logits = mma_v2(gl.convert_layout(keys3, LEFT2), gl.load(q_at + 96, mask=here, other=0.0), logits)
    v_at = tail_v_ptr + row * 8192
    values0, values1 = gl.load(v_at + at), gl.load(v_at + (32 + at))
    values2, values3 = gl.load(v_at + (64 + at)), gl.load(v_at + (96 + at))
    n = gl.arange(0, 64, gl.SliceLayout(1, MMA))[:, None]
    logits = gl.where(n < there, logits * scale, float("-inf"))
    high = gl.max(logits, 0)
    weights = gl.exp2(logits - high[None, :])
    p = gl.convert_layout(weights.to(tail_v_ptr.dtype.element_ty), RIGHT2)
    found0, found1 = _tail_product(values0, p), _tail_product(values1, p)
    found2, found3 = _tail_product(values2, p), _tail_product(values3, p)
    acc0, acc2 = found0 / LEAST, found2 / LEAST  # as sums of levels, see settled
    acc1, acc3 = found1 * (MIXED / LEAST) + acc0, found3 * (MIXED / LEAST) + acc2
    total = everywhere(gl.sum(weights, 0)) / 8  # of eight threads that will be added up
    return everywhere(high) + ROOM, total, acc0, acc1, acc2, acc3


@gluon.jit
def _tail_product(values, p):
    return mma_v2(gl.convert_layout(gl.permute(values, (1, 0)), LEFT2), p, gl.zeros([32, 8], gl.float32, MMA))


@gluon.jit
def _reach(scale):
    """About the binary logarithm of float16 scales, 0.09 below it at most; that of the least float16 of a 0."""
    bits = gl.maximum(scale.to(gl.float32), 2.0**-24).to(gl.int32, bitcast=True)
    return bits.to(gl.float32) * 2.0**-23 - 127.0


@gluon.jit
def add(
    k_slot, v_slot, k_marks_slot, v_marks_slot, q, stepped, factor, back, top, total, offset, acc0, acc1, acc2, acc3
):  # fmt: skip
    """Add a page to what was found of a row."""
    k_scale = k_marks_slot.slice(0, 128).load(gl.SliceLayout(1, RIGHT))
    k_low = k_marks_slot.slice(128, 128).load(gl.SliceLayout(0, LEFT))
    scaled = unmixed(stepped * k_scale[:, None])
    logits = by_entry(mma_v2(key_levels(k_slot.load(UNITS)), scaled, gl.zeros([64, 8], gl.float32, MMA)))
    wide, _ = gl.broadcast(k_low[None, :], gl.zeros([16, 128], gl.float16, LEFT))
    fixed = mma_v2(wide, q, gl.zeros([16, 8], gl.float32, MMA))  # what the least numbers add, in every row alike
    fixed = each(gl.max(gl.reshape(fixed, [2, 8, 8]), 0)) * back
    v_scale = by_token(v_marks_slot.slice(0, 64).load(TOKENS))
    v_low = by_token(v_marks_slot.slice(64, 64).load(TOKENS))
    wide, _ = gl.broadcast(v_scale[:, :, None], gl.zeros([8, 8, 8], gl.float16, PRODUCTS))
    high = gl.max(logits, 0) * factor + fixed + _reach(gl.max(wide, 0))
    if gl.max(gl.reshape((high > top + _SLACK).to(gl.int32), [64]), 0) > 0:
        before = gl.max(top, 0)
        highest = gl.maximum(before, gl.max(high, 0))
        raised = gl.where(highest == float("-inf"), 0.0, highest)
        shrink = gl.exp2(before - raised)
        top = everywhere(raised)
        total, offset, by = total * shrink[None, :], offset * shrink[None, :], columns(shrink)[None, :]
        acc0, acc1, acc2, acc3 = acc0 * by, acc1 * by, acc2 * by, acc3 * by
    weights = gl.exp2(logits * factor + (fixed - (top - ROOM))[None, :, :])
    total += gl.sum(weights, 0)
    offset += gl.sum(weights * v_low.to(gl.float32)[:, :, None], 0)
    p = turned(weights * v_scale.to(gl.float32)[:, :, None])
    first, second, third, fourth = levels(v_slot.load(LEFT))
    acc0, acc1 = mma_v2(first, p, acc0), mma_v2(second, p, acc1)
    acc2, acc3 = mma_v2(third, p, acc2), mma_v2(fourth, p, acc3)
    return top, total, offset, acc0, acc1, acc2, acc3


@gluon.jit
def settled(even, odd, low):
    """Two planes' sums in units of the values' own."""
    return even * LEAST + low, (odd - even) * (LEAST / MIXED) + low
