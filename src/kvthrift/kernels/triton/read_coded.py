"""Decode attention over pages in few bits, and each row's last page as the model gave it, in one launch.

Programs share out the pages as in ``read.py``. Nothing is made whole again: a key channel's scale is folded into the
query, a value's into its weight, and what the middles come to is added once a page, so that the products are of plain
integers. They are the wrong way round, ``K q^T`` and ``V^T p``, because a few queries are a narrow right side.

A byte holds one number of each of ``PLANES`` runs of channels, which have products of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.parts import LN2, join, of_row
from kvthrift.kernels.triton.unpack import lifted, numbers

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged, ReadPlan

_LOG2E = 1.4426950408889634
_JOINED = 8192  # numbers of several parts that are joined at once
_LOG2E_CONST = tl.constexpr(_LOG2E)


@triton.jit
def _query(q_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr,
           D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """``[DP, M]`` the queries' channels of a plane; zero beyond."""
    m, d = tl.arange(0, M), tl.arange(0, DP)
    at = q_ptr + row * QUERIES * D + m[None, :] * D + PLANE * (D // PLANES) + d[:, None]
    return tl.load(at, mask=(m < QUERIES)[None, :] & (d < D // PLANES)[:, None], other=0.0)


@triton.jit
def _product(
    logits, codes, q, scale_ptr, middle_ptr, page, PLANE: tl.constexpr, PLANES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``logits [PAGE, M]`` and what a plane's channels add; the queries' part with the middles, ``[M]``."""
    CENTRE: tl.constexpr = lifted(BITS, q.dtype) - 0.5
    d = tl.arange(0, DP)
    at = page * D + PLANE * (D // PLANES) + d
    inside = d < D // PLANES
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    keys = numbers(codes, PLANE, BITS, FLOATING, PACKED, q.dtype)
    scaled = (q.to(tl.float32) * scale[:, None]).to(q.dtype)
    logits = tl.dot(keys, scaled, logits, input_precision=PRECISION)
    if PACKED and BITS < 8:  # the very numbers that the product has too much, so that nothing of them is left
        logits = tl.dot(tl.full(keys.shape, CENTRE, q.dtype), scaled, logits, input_precision=PRECISION)
    if FLOATING:
        return logits, tl.zeros([q.shape[1]], tl.float32)
    middle = tl.load(middle_ptr + at, mask=inside, other=0.0).to(tl.float32) + 0.5 * scale
    return logits, tl.sum(q.to(tl.float32) * middle[:, None], 0)


@triton.jit
def _gather(acc, codes, weights, shrink, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
            PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc [DVP, M]`` shrunk, and the weighted values of a plane's channels."""
    values = numbers(codes, PLANE, BITS, FLOATING, PACKED, weights.dtype)
    return tl.dot(values, weights, acc * shrink[None, :], input_precision=PRECISION)


@triton.jit
def _keys(tail_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr):  # fmt: skip
    n, d = tl.arange(0, PAGE), tl.arange(0, DP)
    at = tail_ptr + row * (PAGE * D) + n[:, None] * D + PLANE * (D // PLANES) + d[None, :]
    return tl.load(at, mask=(d < D // PLANES)[None, :], other=0.0)


@triton.jit
def _values(tail_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr):  # fmt: skip
    n, d = tl.arange(0, PAGE), tl.arange(0, DP)
    at = tail_ptr + row * (PAGE * D) + n[None, :] * D + PLANE * (D // PLANES) + d[:, None]
    return tl.load(at, mask=(d < D // PLANES)[:, None], other=0.0)


@triton.jit
def _leave(ptr, at, acc, offset, safe, PLANE: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr,
           M: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """Write a plane's channels of an output that begins at ``at``."""
    m, d = tl.arange(0, M), tl.arange(0, DVP)
    out = (acc + offset[None, :]) / safe[None, :]
    where = ptr + at * DV + m[None, :] * DV + PLANE * (DV // PLANES) + d[:, None]
    tl.store(where, out.to(ptr.dtype.element_ty), mask=(m < QUERIES)[None, :] & (d < DV // PLANES)[:, None])


@triton.jit
def _softmax(logits, top, total):
    """Weights ``[PAGE, M]`` under a running maximum, and the running numbers."""
    high = tl.maximum(top, tl.max(logits, 0))
    base = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(logits - base[None, :])
    shrink = tl.exp2(top - base)
    return weights, shrink, high, total * shrink + tl.sum(weights, 0)


@triton.jit
def _read(
    q_ptr, k_ptr, v_ptr, tail_k_ptr, tail_v_ptr, k_scale_ptr, k_middle_ptr, v_scale_ptr, v_middle_ptr, bias_ptr,
    table_ptr, length_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, scale, width, rows,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, QP: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    FLOATING: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    program, programs = tl.program_id(0), tl.num_programs(0)
    if EVEN:
        length = tl.load(length_ptr)
        each = tl.maximum((length + PAGE - 1) // PAGE, 1)  # an empty row has a turn too
        pages_in_all = each * rows
    else:
        r = tl.arange(0, ROWS)
        lengths = tl.load(length_ptr + r, mask=r < rows, other=0)
        pages = tl.where(r < rows, tl.maximum((lengths + PAGE - 1) // PAGE, 1), 0)
        ends = tl.cumsum(pages, 0)
        pages_in_all = tl.sum(pages, 0)
    run = (pages_in_all + programs - 1) // programs
    first, stop = program * run, tl.minimum(program * run + run, pages_in_all)
    if first < stop:
        n, d, dv, m = tl.arange(0, PAGE), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, M)
        in_d, in_dv = (d < D // PLANES)[None, :], (dv < DV // PLANES)[:, None]
        if EVEN:
            first_row, last_row = first // each, (stop - 1) // each
        else:
            first_row = tl.sum((ends <= first).to(tl.int32), 0)
            last_row = tl.sum((ends <= stop - 1).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            if EVEN:
                row_stop, row_first = (row + 1) * each, row * each
            else:
                length = of_row(r, lengths, row)
                row_stop = of_row(r, ends, row)
                row_first = row_stop - of_row(r, pages, row)
            begin = tl.maximum(first, row_first) - row_first
            newest = (length - 1) // PAGE  # the page that is in the tail
            end = tl.minimum(stop, row_stop) - row_first
            q0 = _query(q_ptr, row, 0, PLANES, QUERIES, M, D, DP)
            if PLANES > 1:
                q1 = _query(q_ptr, row, 1, PLANES, QUERIES, M, D, DP)
            if PLANES > 2:
                q2 = _query(q_ptr, row, 2, PLANES, QUERIES, M, D, DP)
                q3 = _query(q_ptr, row, 3, PLANES, QUERIES, M, D, DP)
            top = tl.full([M], float("-inf"), tl.float32)
            total = tl.zeros([M], tl.float32)
            offset = tl.zeros([M], tl.float32)  # what every channel gets alike
            acc0 = tl.zeros([DVP, M], tl.float32)
            acc1, acc2, acc3 = acc0, acc0, acc0
            for index in tl.range(begin, tl.minimum(end, newest), num_stages=STAGES):
                page = tl.load(table_ptr + row * width + index).to(tl.int64)
                k_at = k_ptr + page * (PAGE * (D // PLANES)) + n[:, None] * (D // PLANES) + d[None, :]
                v_at = v_ptr + page * (PAGE * (DV // PLANES)) + dv[:, None] * PAGE + n[None, :]
                k = tl.load(k_at) if DP == D // PLANES else tl.load(k_at, mask=in_d, other=0)
                v = tl.load(v_at) if DVP == DV // PLANES else tl.load(v_at, mask=in_dv, other=0)
                v_scale = tl.load(v_scale_ptr + page * PAGE + n).to(tl.float32)
                logits = tl.zeros([PAGE, M], tl.float32)
                logits, fixed = _product(
                    logits, k, q0, k_scale_ptr, k_middle_ptr, page, 0, PLANES, D, DP, BITS, FLOATING, PACKED, PRECISION
                )  # fmt: skip
                if PLANES > 1:
                    logits, more = _product(
                        logits, k, q1, k_scale_ptr, k_middle_ptr, page, 1, PLANES, D, DP, BITS, FLOATING, PACKED,
                        PRECISION,
                    )  # fmt: skip
                    fixed += more
                if PLANES > 2:
                    logits, more = _product(
                        logits, k, q2, k_scale_ptr, k_middle_ptr, page, 2, PLANES, D, DP, BITS, FLOATING, PACKED,
                        PRECISION,
                    )  # fmt: skip
                    fixed += more
                    logits, more = _product(
                        logits, k, q3, k_scale_ptr, k_middle_ptr, page, 3, PLANES, D, DP, BITS, FLOATING, PACKED,
                        PRECISION,
                    )  # fmt: skip
                    fixed += more
                logits = (logits + fixed[None, :]) * scale
                if HAS_BIAS:
                    logits += tl.load(bias_ptr + page * PAGE + n)[:, None] * _LOG2E_CONST
                weights, shrink, top, total = _softmax(logits, top, total)
                scaled = (weights * v_scale[:, None]).to(tl.bfloat16 if PACKED else q0.dtype)  # wide enough for both
                offset = offset * shrink
                if not FLOATING:
                    v_middle = tl.load(v_middle_ptr + page * PAGE + n).to(tl.float32)
                    below = lifted(BITS, tl.bfloat16) if PACKED and BITS < 8 else 0.5
                    offset += tl.sum(weights * v_middle[:, None] + scaled.to(tl.float32) * below, 0)
                acc0 = _gather(acc0, v, scaled, shrink, 0, BITS, FLOATING, PACKED, PRECISION)
                if PLANES > 1:
                    acc1 = _gather(acc1, v, scaled, shrink, 1, BITS, FLOATING, PACKED, PRECISION)
                if PLANES > 2:
                    acc2 = _gather(acc2, v, scaled, shrink, 2, BITS, FLOATING, PACKED, PRECISION)
                    acc3 = _gather(acc3, v, scaled, shrink, 3, BITS, FLOATING, PACKED, PRECISION)
            if (end > newest) & (length > 0):
                logits = tl.dot(_keys(tail_k_ptr, row, 0, PLANES, PAGE, D, DP), q0, input_precision=PRECISION)
                if PLANES > 1:
                    k1 = _keys(tail_k_ptr, row, 1, PLANES, PAGE, D, DP)
                    logits = tl.dot(k1, q1, logits, input_precision=PRECISION)
                if PLANES > 2:
                    k2 = _keys(tail_k_ptr, row, 2, PLANES, PAGE, D, DP)
                    k3 = _keys(tail_k_ptr, row, 3, PLANES, PAGE, D, DP)
                    logits = tl.dot(k2, q2, logits, input_precision=PRECISION)
                    logits = tl.dot(k3, q3, logits, input_precision=PRECISION)
                logits = logits * scale
                if HAS_BIAS:
                    page = tl.load(table_ptr + row * width + newest).to(tl.int64)
                    logits += tl.load(bias_ptr + page * PAGE + n)[:, None] * _LOG2E_CONST
                logits = tl.where((newest * PAGE + n)[:, None] < length, logits, float("-inf"))
                weights, shrink, top, total = _softmax(logits, top, total)
                scaled = weights.to(q0.dtype)
                offset = offset * shrink
                v0 = _values(tail_v_ptr, row, 0, PLANES, PAGE, DV, DVP)
                acc0 = tl.dot(v0, scaled, acc0 * shrink[None, :], input_precision=PRECISION)
                if PLANES > 1:
                    v1 = _values(tail_v_ptr, row, 1, PLANES, PAGE, DV, DVP)
                    acc1 = tl.dot(v1, scaled, acc1 * shrink[None, :], input_precision=PRECISION)
                if PLANES > 2:
                    v2 = _values(tail_v_ptr, row, 2, PLANES, PAGE, DV, DVP)
                    v3 = _values(tail_v_ptr, row, 3, PLANES, PAGE, DV, DVP)
                    acc2 = tl.dot(v2, scaled, acc2 * shrink[None, :], input_precision=PRECISION)
                    acc3 = tl.dot(v3, scaled, acc3 * shrink[None, :], input_precision=PRECISION)
            safe = tl.where(total > 0, total, 1.0)
            lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
            first_part, last_part = row_first // run, (row_stop - 1) // run  # programs that share this row
            whole = first_part == last_part
            if whole:
                _leave(out_ptr, row * QUERIES, acc0, offset, safe, 0, PLANES, QUERIES, M, DV, DVP)
                if PLANES > 1:
                    _leave(out_ptr, row * QUERIES, acc1, offset, safe, 1, PLANES, QUERIES, M, DV, DVP)
                if PLANES > 2:
                    _leave(out_ptr, row * QUERIES, acc2, offset, safe, 2, PLANES, QUERIES, M, DV, DVP)
                    _leave(out_ptr, row * QUERIES, acc3, offset, safe, 3, PLANES, QUERIES, M, DV, DVP)
                tl.store(lse_ptr + row * QUERIES + m, lse * LN2, mask=m < QUERIES)
            else:
                slot = (program + row) * QUERIES  # a part's own: both grow, and one of them with every part
                _leave(part_ptr, slot, acc0, offset, safe, 0, PLANES, QUERIES, M, DV, DVP)
                if PLANES > 1:
                    _leave(part_ptr, slot, acc1, offset, safe, 1, PLANES, QUERIES, M, DV, DVP)
                if PLANES > 2:
                    _leave(part_ptr, slot, acc2, offset, safe, 2, PLANES, QUERIES, M, DV, DVP)
                    _leave(part_ptr, slot, acc3, offset, safe, 3, PLANES, QUERIES, M, DV, DVP)
                tl.store(part_lse_ptr + slot + m, lse, mask=m < QUERIES)
                tl.debug_barrier()  # all of this program's part is written before it says so
                before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
                if before == last_part - first_part:
                    tl.store(arrived_ptr + row, 0)
                    join(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, QP, DV,
                        PLANES * DVP, PARTS,
                    )  # fmt: skip


def read(
    q: Tensor, paged: Paged, scale: float, plan: ReadPlan | None, *, warps: int = 0, stages: int = 5
) -> tuple[Tensor, Tensor]:
    """See :func:`kvthrift.kernels.paged.paged_attend`; ``warps`` and ``stages`` are for measuring."""
    from kvthrift.kernels.paged import plan_read

    b, heads, length, dim = q.shape
    rows, width = paged.table.shape
    value_dim = paged.values.shape[-1]
    queries = heads * b * length // rows
    plan = plan or plan_read(rows, rows * width, queries, value_dim, q.device)
    out = torch.empty(b, heads, length, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, length, dtype=torch.float32, device=q.device)
    bias, coded = paged.bias, paged.coded
    assert coded is not None
    form, none = coded.format, coded.key_scale
    key_middle, value_middle = (none if t is None else t for t in (coded.key_middle, coded.value_middle))
    narrow = max(8, triton.next_power_of_2(queries))
    deep, wide = (max(16, triton.next_power_of_2(n // form.together)) for n in (dim, value_dim))
    grouped = triton.next_power_of_2(queries)
    _read[(plan.programs,)](
        q.contiguous(), coded.keys, coded.values, paged.keys, paged.values, coded.key_scale, key_middle,
        coded.value_scale, value_middle, none if bias is None else bias, paged.table, paged.lengths, out, lse,
        plan.parts, plan.lses, plan.arrived, scale * _LOG2E, width, rows,
        ROWS=triton.next_power_of_2(rows), QUERIES=queries, M=narrow, D=dim, DP=deep, DV=value_dim, DVP=wide,
        QP=grouped, PARTS=max(1, _JOINED // (grouped * form.together * wide)), PAGE=paged.page, BITS=form.bits,
        FLOATING=form.floating, PACKED=q.is_cuda and q.element_size() == 2, EVEN=plan.even,
        HAS_BIAS=bias is not None, STAGES=stages, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps or 1,
    )  # fmt: skip
    return out, lse
