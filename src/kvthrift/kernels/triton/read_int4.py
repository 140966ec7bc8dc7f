"""Decode attention over pages of 4 bits, by warps that each read pages as their products take them; Gluon.

What ``read_coded.py`` does, for the plain case: 128 channels, pages of 64, up to 8 queries a row that see every entry.
A program is one warp, which keeps a page on its way while it works on another. Weights stay under a running maximum
that is only raised when one would be too large for float16, so that most pages change nothing of the sums before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvthrift.kernels.plan import ReadPlan, plan_read
from kvthrift.kernels.triton.fragments import EACH, HALVES, LINE, MMA, ROWS, barrier, columns, send
from kvthrift.kernels.triton.page_int4 import LEAST, ROOM, add, begin, queries_of, settled
from kvthrift.kernels.triton.parts import launch
from kvthrift.kernels.triton.sight import LOG2E

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged

_LN2 = gl.constexpr(0.6931471805599453)
_WAIT = gl.constexpr("griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0")
_LANE = gl.constexpr("mov.u32 $0, %laneid;")
_TOGETHER = 8  # parts that are joined at once
_TAIL = 3  # pages that could be read while a row's last is, beside it


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _leave(ptr, acc0, acc1, acc2, acc3, safe, QUERIES: gl.constexpr):
    """Write an output ``[QUERIES, 128]``, of which each sum has a run of channels."""
    d = gl.arange(0, 32, gl.SliceLayout(1, MMA))[:, None]
    m = gl.arange(0, 8, gl.SliceLayout(0, MMA))[None, :]
    at, there = ptr + (m * 128 + d), (m < QUERIES) & (d < 32)
    gl.store(at, (acc0 / safe[None, :]).to(ptr.dtype.element_ty), mask=there)
    gl.store(at + 32, (acc1 / safe[None, :]).to(ptr.dtype.element_ty), mask=there)
    gl.store(at + 64, (acc2 / safe[None, :]).to(ptr.dtype.element_ty), mask=there)
    gl.store(at + 96, (acc3 / safe[None, :]).to(ptr.dtype.element_ty), mask=there)


@gluon.jit
def _join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part,
    QUERIES: gl.constexpr, QP: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Write what the parts ``first_part .. last_part`` of a row come to."""
    ALL: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, 1], [2, 1, 0])
    PAIRS: gl.constexpr = gl.SliceLayout(2, ALL)
    OUT: gl.constexpr = gl.SliceLayout(0, ALL)
    p = gl.arange(0, PARTS, gl.SliceLayout(1, PAIRS))[:, None]
    g = gl.arange(0, QP, gl.SliceLayout(0, PAIRS))
    d = gl.arange(0, 128, gl.SliceLayout(0, OUT))[None, :]
    top = gl.full([QP], float("-inf"), gl.float32, gl.SliceLayout(0, PAIRS))
    total = gl.zeros([QP], gl.float32, gl.SliceLayout(0, PAIRS))
    acc = gl.zeros([QP, 128], gl.float32, OUT)
    for other in range(first_part, last_part + 1, PARTS):
        at = (other + p + row) * QUERIES + g[None, :]
        there = (other + p <= last_part) & (g < QUERIES)[None, :]
        lses = gl.load(part_lse_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        parts = gl.load(
            part_ptr + (at[:, :, None] * 128 + d[None, :, :]), mask=there[:, :, None] & (d < 128)[None, :, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        high = gl.maximum(top, gl.max(lses, 0))
        base = gl.where(high == float("-inf"), 0.0, high)
        weight, shrink = gl.exp2(lses - base[None, :]), gl.exp2(top - base)
        total = total * shrink + gl.sum(weight, 0)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        acc += gl.sum(parts * weight[:, :, None], 0)
        top = high
    safe = gl.where(total > 0, total, 1.0)
    rows = gl.arange(0, QP, gl.SliceLayout(1, OUT))[:, None]
    out = (acc / gl.convert_layout(safe, gl.SliceLayout(1, OUT))[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row * QUERIES * 128 + (rows * 128 + d), out, mask=(rows < QUERIES) & (d < 128))
    lse = gl.where(total > 0, top + gl.log2(safe), float("-inf"))
    gl.store(lse_ptr + row * QUERIES + g, lse * _LN2, mask=g < QUERIES)


@gluon.jit
def _of(place, work, programs):
    """The program whose run of the work has a place."""
    return (((place + 1).to(gl.int64) * programs - 1) // work).to(gl.int32)


@gluon.jit
def _read(
    q_ptr, k_ptr, v_ptr, tail_k_ptr, tail_v_ptr, k_marks_ptr, v_marks_ptr, table_ptr, length_ptr, out_ptr, lse_ptr,
    part_ptr, part_lse_ptr, arrived_ptr, scale, width, rows,
    COUNT: gl.constexpr, QUERIES: gl.constexpr, QP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, EXTRA: gl.constexpr, EVEN: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    AHEAD: gl.constexpr = STAGES - 1
    LIST: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if EARLY:
        gl.inline_asm_elementwise(_WAIT, "=r", [], gl.int32, False, 1)
    program = gl.program_id(0)
    if EVEN:
        length = gl.load(length_ptr)
        of_row = (length + 63) // 64 + EXTRA
        work = of_row * rows
    else:
        r = gl.arange(0, COUNT, LIST)
        lengths = gl.load(length_ptr + r, mask=r < rows, other=0)
        each_row = gl.where(r < rows, (lengths + 63) // 64 + EXTRA, 0)
        ends = gl.associative_scan(each_row, 0, _add)
        work = gl.sum(each_row, 0)
    programs = gl.minimum(gl.num_programs(0), work)  # the rest have nothing to do
    first = (program.to(gl.int64) * work // programs).to(gl.int32)
    stop = gl.minimum((program + 1).to(gl.int64) * work // programs, work).to(gl.int32)
    k_slots = gl.allocate_shared_memory(gl.int16, [STAGES, 64, 32], ROWS)
    v_slots = gl.allocate_shared_memory(gl.int16, [STAGES, 32, 64], HALVES)
    k_marks_slots = gl.allocate_shared_memory(gl.float16, [STAGES, 256], LINE)
    v_marks_slots = gl.allocate_shared_memory(gl.float16, [STAGES, 128], LINE)
    if first < stop:
        if EVEN:
            first_row, last_row = first // of_row, (stop - 1) // of_row
        else:
            first_row = gl.sum((ends <= first).to(gl.int32), 0)
            last_row = gl.sum((ends <= stop - 1).to(gl.int32), 0)
        for row in range(first_row, last_row + 1):
            if EVEN:
                row_stop, row_first = (row + 1) * of_row, row * of_row
            else:
                length = gl.sum(gl.where(r == row, lengths, 0), 0)
                row_stop = gl.sum(gl.where(r == row, ends, 0), 0)
                row_first = row_stop - gl.sum(gl.where(r == row, each_row, 0), 0)
            start = gl.maximum(first, row_first) - row_first
            newest = (length - 1) // 64  # the page that is in the tail
            last = gl.minimum(gl.minimum(stop, row_stop) - row_first, newest)
            # A page's number is kept by every thread, which the compiler has to believe different: it would wait for
            # the load at once to move the number to where all threads share it.
            apart = gl.inline_asm_elementwise(_LANE, "=r", [], gl.int32, True, 1) * (length >> 31)
            table = table_ptr + row * width + apart
            for i in gl.static_range(AHEAD):
                page = gl.load(table + start + i, mask=start + i < last, other=0).to(gl.int64)
                send(
                    k_slots.index(i), v_slots.index(i), k_marks_slots.index(i), v_marks_slots.index(i), k_ptr, v_ptr,
                    k_marks_ptr, v_marks_ptr, page,
                )  # fmt: skip
                async_copy.commit_group()
            coming = gl.load(table + start + AHEAD, mask=start + AHEAD < last, other=0)
            q, stepped, lifted = queries_of(q_ptr, row, QUERIES)
            back = scale * lifted
            top = gl.full([8, 8], float("-inf"), gl.float32, EACH)
            total = gl.zeros([8, 8], gl.float32, EACH)
            offset = total
            acc0 = gl.zeros([32, 8], gl.float32, MMA)
            acc1, acc2, acc3 = acc0, acc0, acc0
            if (stop >= row_stop) & (length > 0):
                top, total, acc0, acc1, acc2, acc3 = begin(
                    q_ptr, tail_k_ptr, tail_v_ptr, row, length - newest * 64, scale, QUERIES
                )  # fmt: skip
            slot = 0
            for index in range(start, last):
                async_copy.wait_group(AHEAD - 1)
                free = gl.where(slot == 0, AHEAD, slot - 1)
                send(
                    k_slots.index(free), v_slots.index(free), k_marks_slots.index(free), v_marks_slots.index(free),
                    k_ptr, v_ptr, k_marks_ptr, v_marks_ptr, coming.to(gl.int64),
                )  # fmt: skip
                async_copy.commit_group()
                after = index + STAGES
                coming = gl.load(table + after, mask=after < last, other=0)
                top, total, offset, acc0, acc1, acc2, acc3 = add(
                    k_slots.index(slot), v_slots.index(slot), k_marks_slots.index(slot), v_marks_slots.index(slot),
                    q, stepped, back * LEAST, back, top, total, offset, acc0, acc1, acc2, acc3,
                )  # fmt: skip
                slot = gl.where(slot == AHEAD, 0, slot + 1)
            async_copy.wait_group(0)
            low = columns(gl.sum(offset, 0))[None, :]
            acc0, acc1 = settled(acc0, acc1, low)
            acc2, acc3 = settled(acc2, acc3, low)
            found = columns(gl.sum(total, 0))
            safe = gl.where(found > 0, found, 1.0)
            lse = gl.where(found > 0, columns(gl.max(top, 0)) - ROOM + gl.log2(safe), float("-inf"))
            first_part = _of(row_first, work, programs)  # programs that share this row
            last_part = _of(row_stop - 1, work, programs)
            m = gl.arange(0, 8, gl.SliceLayout(0, MMA))
            if first_part == last_part:
                at = row * QUERIES
                _leave(out_ptr + at * 128, acc0, acc1, acc2, acc3, safe, QUERIES)
                gl.store(lse_ptr + at + m, lse * _LN2, mask=m < QUERIES)
            else:
                at = (program + row) * QUERIES  # a part's own: both grow, and one of them with every part
                _leave(part_ptr + at * 128, acc0, acc1, acc2, acc3, safe, QUERIES)
                gl.store(part_lse_ptr + at + m, lse, mask=m < QUERIES)
                barrier()  # all of this program's part is written before it says so
                before = gl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
                if before == last_part - first_part:
                    gl.store(arrived_ptr + row, 0)
                    _join(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, QP, PARTS
                    )  # fmt: skip


def read(
    q: Tensor, paged: Paged, scale: float, plan: ReadPlan | None = None, *, stages: int = 2, parts: int = _TOGETHER,
    extra: int = _TAIL, registers: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kvthrift.kernels.paged.paged_attend`; of what is sent here from there.

    Args:
        stages, parts, extra, registers: for measuring.
    """
    b, heads, length, dim = q.shape
    rows, width = paged.table.shape
    queries = heads * b * length // rows
    plan = plan or plan_read(rows, rows * width, queries, dim, q.device, coded=True)
    out = torch.empty(b, heads, length, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, length, dtype=torch.float32, device=q.device)
    coded = paged.coded
    assert coded is not None
    _read[(plan.programs,)](
        q.contiguous(), coded.keys, coded.values, paged.keys, paged.values, coded.key_marks, coded.value_marks,
        paged.table, paged.lengths, out, lse, plan.parts, plan.lses, plan.arrived, scale * LOG2E, width, rows,
        COUNT=max(32, triton.next_power_of_2(rows)), QUERIES=queries,
        QP=triton.next_power_of_2(queries), PARTS=parts, STAGES=stages, EXTRA=extra, EVEN=plan.even, num_warps=1,
        maxnreg=registers or None, **launch(q.device),
    )  # fmt: skip
    return out, lse
