"""One new entry for every row, in front of pages in few bits; a last page that is full is written in few bits first.

Everything is decided on the device, row by row, so that it can be part of a CUDA graph. The arithmetic is that of
``kernels/codes.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.codes import groups
from kvthrift.kernels.triton.unpack import planes_of

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged

_LARGEST_FLOAT = tl.constexpr(448.0)
_LARGEST_HALF = tl.constexpr(65504.0)
_BELOW = tl.constexpr(-(2**15) + 1)  # bits of the first float16 below zero


@triton.jit
def _scales(low, high, BITS: tl.constexpr, FLOATING: tl.constexpr):
    """Float16 scale and least number of groups, as in ``codes``; NaN where float16 cannot express them."""
    least = low.to(tl.float16)
    if FLOATING:
        reach = tl.div_rn(tl.maximum(high, -low), tl.full(low.shape, _LARGEST_FLOAT, tl.float32))
    else:
        bits = least.to(tl.int16, bitcast=True)
        bits = tl.where(least > 0, bits - 1, tl.where(least == 0, _BELOW, bits + 1)).to(tl.int16)
        least = tl.where(least.to(tl.float32) > low, bits.to(tl.float16, bitcast=True), least)
        span = high - least.to(tl.float32)
        reach = tl.div_rn(span, tl.full(low.shape, 2.0**BITS - 1, tl.float32))
    nearest = reach.to(tl.float16)
    above = (nearest.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(nearest.to(tl.float32) < reach, above, nearest)
    scale = tl.where(tl.abs(scale.to(tl.float32)) <= _LARGEST_HALF, scale, float("nan"))
    return scale, tl.where(tl.abs(least.to(tl.float32)) <= _LARGEST_HALF, least, float("nan"))


@triton.jit
def _codes(x, scale, low, BITS: tl.constexpr, FLOATING: tl.constexpr):
    """Levels as int32; scale and least number broadcast against ``x``, float32."""
    safe = tl.where(scale == 0, 1.0, scale)
    if FLOATING:
        return tl.div_rn(x, safe).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    units = tl.div_rn(x - low, safe)
    return tl.minimum(tl.maximum(tl.floor(units + 0.5), 0.0), 2.0**BITS - 1.0).to(tl.int32)


@triton.jit
def _append(
    new_k_ptr, new_v_ptr, new_position_ptr, k_ptr, v_ptr, position_ptr, codes_k_ptr, codes_v_ptr, k_marks_ptr,
    v_marks_ptr, table_ptr, length_ptr, k_stride, v_stride, position_stride, width,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = planes_of(BITS)
    K: tl.constexpr = D // PLANES
    RUNS: tl.constexpr = PLANES if PLANES > GROUPS else GROUPS  # of a value's channels
    EACH: tl.constexpr = RUNS // GROUPS
    V: tl.constexpr = DV // RUNS
    MARKS: tl.constexpr = 1 if FLOATING else 2
    row = tl.program_id(0)
    length = tl.load(length_ptr + row)
    tail_k, tail_v = k_ptr + row.to(tl.int64) * (PAGE * D), v_ptr + row.to(tl.int64) * (PAGE * DV)
    if (length > 0) & (length % PAGE == 0):
        page = tl.load(table_ptr + row * width + length // PAGE - 1).to(tl.int64)
        n, c, cv = tl.arange(0, PAGE), tl.arange(0, DP), tl.arange(0, DVP)
        packed = tl.zeros([PAGE, DP], tl.int32)
        for plane in tl.static_range(PLANES):
            at = n[:, None] * D + plane * K + c[None, :]
            x = tl.load(tail_k + at, mask=(c < K)[None, :], other=0.0).to(tl.float32)
            odd = tl.sum(x * 0.0, 0)  # NaN where a number is not finite
            scale, least = _scales(tl.min(x, 0) + odd, tl.max(x, 0) + odd, BITS, FLOATING)
            marks = k_marks_ptr + page * (MARKS * D) + plane * K + c
            tl.store(marks, scale, mask=c < K)
            if not FLOATING:
                tl.store(marks + D, least, mask=c < K)
            scale, least = scale.to(tl.float32), least.to(tl.float32)
            packed |= _codes(x, scale[None, :], least[None, :], BITS, FLOATING) << (BITS * plane)
        tl.store(
            codes_k_ptr + page * (PAGE * K) + n[:, None] * K + c[None, :], packed.to(codes_k_ptr.dtype.element_ty),
            mask=(c < K)[None, :],
        )  # fmt: skip
        inside, turned = (cv < V)[:, None], tl.zeros([DVP, PAGE], tl.int32)
        for group in tl.static_range(GROUPS):
            low, high = tl.full([PAGE], float("inf"), tl.float32), tl.full([PAGE], float("-inf"), tl.float32)
            odd = tl.zeros([PAGE], tl.float32)
            for run in tl.static_range(group * EACH, group * EACH + EACH):
                at = n[None, :] * DV + run * V + cv[:, None]
                x = tl.load(tail_v + at, mask=inside, other=0.0).to(tl.float32)
                low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
                high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), 0))
                odd += tl.sum(x * 0.0, 0)
            scale, least = _scales(low + odd, high + odd, BITS, FLOATING)
            marks = v_marks_ptr + page * (MARKS * GROUPS * PAGE) + group * PAGE + n
            tl.store(marks, scale)
            if not FLOATING:
                tl.store(marks + GROUPS * PAGE, least)
            scale, least = scale.to(tl.float32), least.to(tl.float32)
            for run in tl.static_range(group * EACH, group * EACH + EACH):
                at = n[None, :] * DV + run * V + cv[:, None]
                x = tl.load(tail_v + at, mask=inside, other=0.0).to(tl.float32)
                codes = _codes(x, scale[None, :], least[None, :], BITS, FLOATING)
                if RUNS > PLANES:  # a run is rows of its own, not bits of the others' units
                    rows = codes_v_ptr + page * (PAGE * DV) + (run * V + cv)[:, None] * PAGE
                    tl.store(rows + n[None, :], codes.to(codes_v_ptr.dtype.element_ty), mask=inside)
                else:
                    turned |= codes << (BITS * run)
        if RUNS == PLANES:
            rows = codes_v_ptr + page * (PAGE * V) + cv[:, None] * PAGE
            tl.store(rows + n[None, :], turned.to(codes_v_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the tail was read by all before its first entry is written over
    place = length % PAGE
    position = tl.load(new_position_ptr + (row // HEADS) * position_stride)
    d, dv = tl.arange(0, PLANES * DP), tl.arange(0, RUNS * DVP)
    k = tl.load(new_k_ptr + row * k_stride + d, mask=d < D)
    v = tl.load(new_v_ptr + row * v_stride + dv, mask=dv < DV)
    tl.store(tail_k + place * D + d, k, mask=d < D)
    tl.store(tail_v + place * DV + dv, v, mask=dv < DV)
    page = tl.load(table_ptr + row * width + length // PAGE).to(tl.int64)
    tl.store(position_ptr + page * PAGE + place, position.to(tl.int32))
    tl.store(length_ptr + row, length + 1)


def append(k: Tensor, v: Tensor, positions: Tensor, paged: Paged) -> None:
    """See :func:`kvthrift.kernels.paged.paged_append`."""
    rows, width = paged.table.shape
    dim, value_dim = k.shape[-1], v.shape[-1]
    k, v = k.reshape(rows, dim), v.reshape(rows, value_dim)
    if k.stride(1) != 1:
        k = k.contiguous()
    if v.stride(1) != 1:
        v = v.contiguous()
    coded = paged.coded
    assert coded is not None
    form, many = coded.format, groups(value_dim)
    _append[(rows,)](
        k, v, positions, paged.keys, paged.values, paged.positions, coded.keys, coded.values, coded.key_marks,
        coded.value_marks, paged.table, paged.lengths, k.stride(0), v.stride(0),
        positions.stride(0), width,
        HEADS=rows // positions.shape[0], D=dim, DP=triton.next_power_of_2(dim // form.together),
        DV=value_dim, DVP=triton.next_power_of_2(value_dim // max(form.together, many)), PAGE=paged.page,
        BITS=form.bits, FLOATING=form.floating, GROUPS=many, num_warps=4,
    )  # fmt: skip
