"""Decode attention over pages in one launch: a grid of equal runs of pages, joined by whoever comes last.

Heads of any lengths share the grid, so one long head among short ones costs nothing. Every program reads one run of
one row with a running softmax in base two; where a row has several runs, each leaves its part in scratch, and the last
one to arrive (an atomic count) joins them by log-sum-exp, as in Flash-Decoding (no second launch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged, ReadPlan

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E_CONST = tl.constexpr(_LOG2E)


@triton.jit
def _read(
    q_ptr, k_ptr, v_ptr, bias_ptr, table_ptr, length_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr,
    scale, width, runs,
    QUERIES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, RUN: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, run = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr + row)
    pages = (length + PAGE - 1) // PAGE
    first = run * RUN
    if (first < pages) | (run == 0):
        m, d, dv, n = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, PAGE)
        inside, in_d, in_dv = m < QUERIES, d < D, dv < DV
        q = tl.load(
            q_ptr + row * QUERIES * D + m[:, None] * D + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0
        )
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DVP], tl.float32)
        stop = tl.minimum(first + RUN, pages)
        for index in tl.range(first, stop, num_stages=STAGES):
            page = tl.load(table_ptr + row * width + index).to(tl.int64)
            k_at = k_ptr + page * (PAGE * D) + n[:, None] * D + d[None, :]
            v_at = v_ptr + page * (PAGE * DV) + n[:, None] * DV + dv[None, :]
            k = tl.load(k_at) if DP == D else tl.load(k_at, mask=in_d[None, :], other=0.0)
            v = tl.load(v_at) if DVP == DV else tl.load(v_at, mask=in_dv[None, :], other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if HAS_BIAS:
                logits += tl.load(bias_ptr + page * PAGE + n)[None, :] * _LOG2E_CONST
            logits = tl.where((index * PAGE + n)[None, :] < length, logits, float("-inf"))
            high = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(high == float("-inf"), 0.0, high)
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = high
        used = tl.maximum((pages + RUN - 1) // RUN, 1)
        safe = tl.where(total > 0, total, 1.0)
        lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
        out_at = row * QUERIES * DV + m[:, None] * DV + dv[None, :]
        held = inside[:, None] & in_dv[None, :]
        if used == 1:
            tl.store(out_ptr + out_at, (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=held)
            tl.store(lse_ptr + row * QUERIES + m, lse * _LN2, mask=inside)
        else:
            slot = (row * runs + run) * QUERIES
            tl.store(part_ptr + slot * DV + m[:, None] * DV + dv[None, :], acc / safe[:, None], mask=held)
            tl.store(part_lse_ptr + slot + m, lse, mask=inside)
            tl.debug_barrier()  # all of this program's parts are written before it says so
            before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
            if before == used - 1:
                tl.store(arrived_ptr + row, 0)
                top = tl.full([M], float("-inf"), tl.float32)
                total = tl.zeros([M], tl.float32)
                acc = tl.zeros([M, DVP], tl.float32)
                for other in range(used):
                    slot = (row * runs + other) * QUERIES
                    part_lse = tl.load(part_lse_ptr + slot + m, mask=inside, other=float("-inf"), cache_modifier=".cg")
                    part = tl.load(
                        part_ptr + slot * DV + m[:, None] * DV + dv[None, :], mask=held, other=0.0, cache_modifier=".cg"
                    )
                    high = tl.maximum(top, part_lse)
                    base = tl.where(high == float("-inf"), 0.0, high)
                    weight = tl.exp2(part_lse - base)
                    shrink = tl.exp2(top - base)
                    total = total * shrink + weight
                    acc = acc * shrink[:, None] + part * weight[:, None]
                    top = high
                safe = tl.where(total > 0, total, 1.0)
                tl.store(out_ptr + out_at, (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=held)
                lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
                tl.store(lse_ptr + row * QUERIES + m, lse * _LN2, mask=inside)


def read(
    q: Tensor, paged: Paged, scale: float, plan: ReadPlan | None, *, warps: int = 4, stages: int = 3
) -> tuple[Tensor, Tensor]:
    """See :func:`kvthrift.kernels.paged.paged_attend`."""
    from kvthrift.kernels.paged import plan_read

    b, heads, length, dim = q.shape
    rows, width = paged.table.shape
    value_dim = paged.values.shape[-1]
    queries = heads * b * length // rows
    plan = plan or plan_read(rows, width, queries, value_dim, q.device)
    out = torch.empty(b, heads, length, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, length, dtype=torch.float32, device=q.device)
    bias = paged.bias
    _read[(rows, plan.runs)](
        q.contiguous(), paged.keys, paged.values, paged.keys if bias is None else bias, paged.table, paged.lengths,
        out, lse, plan.parts, plan.lses, plan.arrived, scale * _LOG2E, width, plan.runs,
        QUERIES=queries, M=max(16, triton.next_power_of_2(queries)), D=dim, DP=max(16, triton.next_power_of_2(dim)),
        DV=value_dim, DVP=max(16, triton.next_power_of_2(value_dim)), PAGE=paged.page, RUN=plan.run,
        HAS_BIAS=bias is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return out, lse
