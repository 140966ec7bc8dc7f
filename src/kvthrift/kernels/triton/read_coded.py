"""Decode attention over pages in few bits, and each row's last page as the model gave it, in one launch.

Programs share out the pages as in ``read.py``. Nothing is made whole again: a key channel's scale is folded into the
query, a value's into its weight, and what the least numbers come to is added once a page, so that the products are of
plain levels. They are the wrong way round, ``K q^T`` and ``V^T p``, because a few queries are a narrow right side.

A unit holds one number of each of ``PLANES`` runs of channels, which have products of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.codes import groups
from kvthrift.kernels.plan import ReadPlan, plan_read
from kvthrift.kernels.triton.parts import LN2, await_others, join, launch, of_row
from kvthrift.kernels.triton.planes import (
    ROOM,
    channels,
    deep,
    gather,
    largest,
    leave,
    marks_of,
    power_above,
    product,
    queries_of,
    query,
    settled,
    softmax,
    tail_keys,
    tail_values,
    weigh,
    within,
)  # fmt: skip
from kvthrift.kernels.triton.sight import LOG2E, behind, blocks, capped, ends_of, features, oldest
from kvthrift.kernels.triton.unpack import planes_of, rise, steps

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged

_MOST = 32 * 128  # numbers of an output that one program holds, at most
_MANY = 64  # queries of one program, at most
_JOINED = 8192  # numbers of several parts that are joined at once
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _read(
    q_ptr, k_ptr, v_ptr, tail_k_ptr, tail_v_ptr, k_marks_ptr, v_marks_ptr, bias_ptr,
    table_ptr, length_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, position_ptr,
    query_position_ptr, scale, width, rows, window, cap,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HERE: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, QP: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    EVEN: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, STEPS: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = planes_of(BITS)
    MARKS: tl.constexpr = 1 if FLOATING else 2
    CHANGED: tl.constexpr = CAPPED or HAS_BIAS or CAUSAL or WINDOWED  # logits, one by one
    RUNS: tl.constexpr = PLANES if PLANES > GROUPS else GROUPS  # of a value's channels
    await_others(EARLY)
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
        in_d, in_dv = (d < D // PLANES)[None, :], (dv < DV // RUNS)[:, None]
        channel, there_d = channels(PLANES, D, DP)
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
            if CAUSAL:
                seen = ends_of(length, m, STEPS)
            if WINDOWED:
                gone = oldest(query_position_ptr, row, m, window, HEADS, STEPS)
            q = queries_of(q_ptr, row, PLANES, QUERIES, HERE, M, D, DP).to(tl.float32)
            lifted = tl.exp2(power_above(largest(q)))  # queries are at most 1, so that float16 has them times any scale
            back = scale * lifted
            q = q / lifted
            stepped = (q / steps(PLANES * DP, DP, BITS, PACKED)[:, None]).to(HALF)
            q = q.to(HALF)
            top = tl.full([M], float("-inf"), tl.float32)
            total = tl.zeros([8, M], tl.float32)  # yet to be added up, as is
            offset = tl.zeros([8, M], tl.float32)  # what every channel of a group gets alike
            offset1 = offset
            acc0 = tl.zeros([DVP, M], tl.float32)
            acc1, acc2, acc3 = acc0, acc0, acc0
            for index in tl.range(begin, tl.minimum(end, newest), num_stages=STAGES):
                page = tl.load(table_ptr + row * width + index).to(tl.int64)
                k_at = k_ptr + page * (PAGE * (D // PLANES)) + d[None, :] + n[:, None] * (D // PLANES)
                k = tl.load(k_at) if DP == D // PLANES else tl.load(k_at, mask=in_d, other=0)
                v_marks = v_marks_ptr + page * (MARKS * GROUPS * PAGE)
                v_scale, v_low = marks_of(v_marks, GROUPS * PAGE, n, n >= 0, True, FLOATING)
                widest = v_scale
                if GROUPS > 1:
                    v_scale1, v_low1 = marks_of(v_marks + PAGE, GROUPS * PAGE, n, n >= 0, True, FLOATING)
                    widest = tl.maximum(v_scale, v_scale1)
                k_marks = k_marks_ptr + page * (MARKS * D)
                k_scale, k_low = marks_of(k_marks, D, channel, there_d, DP == D // PLANES, FLOATING)
                logits, fixed = product(k, q, stepped, k_scale, k_low, BITS, FLOATING, PACKED, PRECISION)
                factor = back * rise(FLOATING, PACKED)
                fixed *= back
                if CHANGED:
                    logits = tl.reshape(deep(logits) * factor + fixed[None, :, :], [PAGE, M])
                    factor, fixed = 1.0, tl.zeros([8, M], tl.float32)
                if CAPPED:
                    logits = capped(logits, cap)
                if HAS_BIAS:
                    logits += tl.load(bias_ptr + page * PAGE + n)[:, None] * _LOG2E
                if CAUSAL:
                    logits = tl.where((index * PAGE + n)[:, None] < seen[None, :], logits, float("-inf"))
                if WINDOWED:
                    logits = within(logits, position_ptr, page, gone, n, PAGE)
                weights, shrink, top, total = softmax(logits, factor, fixed, top, total, widest)
                scaled, offset = weigh(weights, shrink, offset, v_scale, v_low, FLOATING, HALF)
                scaled1 = scaled
                if GROUPS > 1:
                    scaled1, offset1 = weigh(weights, shrink, offset1, v_scale1, v_low1, FLOATING, HALF)
                v_at = v_ptr + page * (PAGE * (DV // PLANES)) + n[None, :] + dv[:, None] * PAGE
                v = tl.load(v_at) if DVP == DV // RUNS else tl.load(v_at, mask=in_dv, other=0)
                acc0 = gather(acc0, v, scaled, shrink, 0, BITS, FLOATING, PACKED, PRECISION)
                if RUNS > PLANES:
                    v1 = tl.load(v_at + (DV // RUNS) * PAGE, mask=in_dv, other=0)
                    acc1 = gather(acc1, v1, scaled1, shrink, 0, BITS, FLOATING, PACKED, PRECISION)
                if PLANES > 1:
                    acc1 = gather(acc1, v, scaled, shrink, 1, BITS, FLOATING, PACKED, PRECISION)
                    acc2 = gather(acc2, v, scaled1, shrink, 2, BITS, FLOATING, PACKED, PRECISION)
                    acc3 = gather(acc3, v, scaled1, shrink, 3, BITS, FLOATING, PACKED, PRECISION)
            if GROUPS == 1:
                offset1 = offset
            acc0 = settled(acc0, offset, 0, BITS, FLOATING, PACKED)
            if RUNS > PLANES:
                acc1 = settled(acc1, offset1, 0, BITS, FLOATING, PACKED)
            if PLANES > 1:
                acc1 = settled(acc1, offset, 1, BITS, FLOATING, PACKED)
                acc2 = settled(acc2, offset1, 2, BITS, FLOATING, PACKED)
                acc3 = settled(acc3, offset1, 3, BITS, FLOATING, PACKED)
            if (end > newest) & (length > 0):
                logits = tl.zeros([PAGE, M], tl.float32)
                for plane in tl.static_range(PLANES):
                    k_tail = tail_keys(tail_k_ptr, row, plane, PLANES, PAGE, D, DP)
                    part = query(q_ptr, row, plane, PLANES, QUERIES, HERE, M, D, DP)
                    logits = tl.dot(k_tail, part, logits, input_precision=PRECISION)
                logits = logits * scale
                if CAPPED:
                    logits = capped(logits, cap)
                if HAS_BIAS or WINDOWED:
                    page = tl.load(table_ptr + row * width + newest).to(tl.int64)
                if HAS_BIAS:
                    logits += tl.load(bias_ptr + page * PAGE + n)[:, None] * _LOG2E
                there = (newest * PAGE + n)[:, None] < (seen[None, :] if CAUSAL else length)
                logits = tl.where(there, logits, float("-inf"))
                if WINDOWED:
                    logits = within(logits, position_ptr, page, gone, n, PAGE)
                weights, shrink, top, total = softmax(
                    logits, 1.0, tl.zeros([8, M], tl.float32), top, total, tl.full([PAGE], 1.0, tl.float16)
                )
                scaled = tl.reshape(weights.to(tail_v_ptr.dtype.element_ty), [PAGE, M])
                v0 = tail_values(tail_v_ptr, row, 0, RUNS, PAGE, DV, DVP)
                acc0 = tl.dot(v0, scaled, acc0 * shrink[None, :], input_precision=PRECISION)
                if RUNS > 1:
                    v1 = tail_values(tail_v_ptr, row, 1, RUNS, PAGE, DV, DVP)
                    acc1 = tl.dot(v1, scaled, acc1 * shrink[None, :], input_precision=PRECISION)
                if RUNS > 2:
                    v2 = tail_values(tail_v_ptr, row, 2, RUNS, PAGE, DV, DVP)
                    v3 = tail_values(tail_v_ptr, row, 3, RUNS, PAGE, DV, DVP)
                    acc2 = tl.dot(v2, scaled, acc2 * shrink[None, :], input_precision=PRECISION)
                    acc3 = tl.dot(v3, scaled, acc3 * shrink[None, :], input_precision=PRECISION)
            whole_total = tl.sum(total, 0)
            safe = tl.where(whole_total > 0, whole_total, 1.0)
            lse = tl.where(whole_total > 0, top - ROOM + tl.log2(safe), float("-inf"))
            first_part, last_part = row_first // run, (row_stop - 1) // run  # programs that share this row
            whole = first_part == last_part
            if whole:
                leave(out_ptr, row * QUERIES, acc0, safe, 0, RUNS, HERE, M, DV, DVP)
                if RUNS > 1:
                    leave(out_ptr, row * QUERIES, acc1, safe, 1, RUNS, HERE, M, DV, DVP)
                if RUNS > 2:
                    leave(out_ptr, row * QUERIES, acc2, safe, 2, RUNS, HERE, M, DV, DVP)
                    leave(out_ptr, row * QUERIES, acc3, safe, 3, RUNS, HERE, M, DV, DVP)
                tl.store(lse_ptr + row * QUERIES + m, lse * LN2, mask=m < HERE)
            else:
                slot = (program + row) * QUERIES  # a part's own: both grow, and one of them with every part
                leave(part_ptr, slot, acc0, safe, 0, RUNS, HERE, M, DV, DVP)
                if RUNS > 1:
                    leave(part_ptr, slot, acc1, safe, 1, RUNS, HERE, M, DV, DVP)
                if RUNS > 2:
                    leave(part_ptr, slot, acc2, safe, 2, RUNS, HERE, M, DV, DVP)
                    leave(part_ptr, slot, acc3, safe, 3, RUNS, HERE, M, DV, DVP)
                tl.store(part_lse_ptr + slot + m, lse, mask=m < HERE)
                tl.debug_barrier()  # all of this program's part is written before it says so
                before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
                if before == last_part - first_part:
                    tl.store(arrived_ptr + row, 0)
                    join(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, HERE, QP,
                        DV, RUNS * DVP, PARTS,
                    )  # fmt: skip


def read(
    q: Tensor, paged: Paged, scale: float, plan: ReadPlan | None, *, causal: bool = False, window: int | None = None,
    positions: Tensor | None = None, cap: float | None = None, warps: int = 0, stages: int = 4,
    packed: bool | None = None, registers: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kvthrift.kernels.paged.paged_attend`.

    Args:
        warps, stages, packed, registers: for measuring.
    """
    b, heads, length, dim = q.shape
    rows, width = paged.table.shape
    value_dim = paged.values.shape[-1]
    queries = heads * b * length // rows
    plan = plan or plan_read(rows, rows * width, queries, value_dim, q.device, coded=True)
    out = torch.empty(b, heads, length, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, length, dtype=torch.float32, device=q.device)
    bias, coded = paged.bias, paged.coded
    assert coded is not None
    form = coded.format
    many, deep = groups(value_dim), max(16, triton.next_power_of_2(dim // form.together))
    runs = max(form.together, many)
    wide = max(16, triton.next_power_of_2(value_dim // runs))
    sight = features(q, rows, causal, window, positions, cap)
    for first, here in blocks(queries, sight["STEPS"], min(_MANY, _MOST // max(deep * form.together, wide * runs))):
        narrow, grouped = max(8, triton.next_power_of_2(here)), triton.next_power_of_2(here)
        _read[(plan.programs,)](
            behind(q.contiguous(), first), coded.keys, coded.values, paged.keys, paged.values,
            coded.key_marks, coded.value_marks, coded.key_marks if bias is None else bias, paged.table, paged.lengths,
            behind(out, first), behind(lse, first, 1), behind(plan.parts, first), behind(plan.lses, first, 1),
            plan.arrived, paged.positions if window is not None else None,
            scale=scale * LOG2E, width=width, rows=rows, **sight,
            ROWS=triton.next_power_of_2(rows), QUERIES=queries, HERE=here, M=narrow, D=dim, DP=deep, DV=value_dim,
            DVP=wide, QP=grouped, PARTS=max(1, _JOINED // (grouped * runs * wide)), PAGE=paged.page,
            BITS=form.bits, GROUPS=many, FLOATING=form.floating,
            PACKED=q.is_cuda and q.element_size() == 2 if packed is None else packed,
            HALF=tl.float16 if q.element_size() == 2 else tl.float32, EVEN=plan.even,
            HAS_BIAS=bias is not None, STAGES=stages,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=warps or _warps(narrow, max(dim, value_dim)), maxnreg=registers or None,
            **launch(q.device),
        )  # fmt: skip
    return out, lse


def _warps(queries: int, dim: int) -> int:
    """As few as have the registers, and never four: from there on Triton makes products for groups of warps.

    With an operand that is made in registers those gave wrong numbers, or read out of bounds (Triton 3.6, H200).
    """
    return 1 if queries <= 16 and dim <= 128 else 2
