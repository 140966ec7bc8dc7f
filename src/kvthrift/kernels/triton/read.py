"""Decode attention over pages in one launch, shared out evenly however long each head is.

Every row is cut into runs of as many pages, and a program has one run. It finds its place by itself (a cumulative sum
over the rows' runs), so nothing is planned on the host. Rows of one length need no search. Or (not ``aligned``) the
pages of all rows are one list, cut into equal runs that may span several rows. Within a row: a running softmax in base
two. Where a row is cut, each program leaves its part in scratch, and the last one to arrive (an atomic count) joins the
parts by log-sum-exp, as in Flash-Decoding and Stream-K (2301.03598), without a second launch; parts of a long row are
joined by the last few to arrive, a slice of the channels each (``combine.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.plan import ReadPlan, plan_read
from kvthrift.kernels.triton.combine import NARROWEST, settle
from kvthrift.kernels.triton.parts import LN2, await_others, launch, let_others, of_row
from kvthrift.kernels.triton.sight import LOG2E, behind, blocks, capped, ends_of, features, oldest

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged

_MOST = 128 * 128  # numbers of an output that one program holds, at most
_MANY = 128  # queries of one program, at most
_JOINED = 8192  # numbers of several parts that are joined at once
_AHEAD = 3  # pages on their way where programs are too few to hide each other's waiting, and equal; else one less
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["width", "runs"])
def _read(
    q_ptr, k_ptr, v_ptr, bias_ptr, table_ptr, length_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr,
    turn_ptr, position_ptr, query_position_ptr, scale, width, rows, runs, window, cap,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HERE: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, QP: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr,
    EVEN: tl.constexpr, ROWWISE: tl.constexpr, ALIGNED: tl.constexpr,
    HELPERS: tl.constexpr, POLLS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, STEPS: tl.constexpr,
    HEADS: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    await_others(EARLY, not LATE)
    program, programs = tl.program_id(0), tl.num_programs(0)
    if EVEN:
        length = tl.load(length_ptr)
        each = tl.maximum((length + PAGE - 1) // PAGE, 1)  # an empty row has a turn too
        pages_in_all = each * rows
    else:
        r = tl.arange(0, ROWS)
        lengths = tl.load(length_ptr + r, mask=r < rows, other=0)
        pages = tl.where(r < rows, tl.maximum((lengths + PAGE - 1) // PAGE, 1), 0)
        pages_in_all = tl.sum(pages, 0)
    if ROWWISE:  # whole rows are cut, each by as many programs
        splits = programs // rows
        run = (each + splits - 1) // splits
        own = program // splits
        first_part = own * splits
        last_part = first_part + (each - 1) // run
    elif ALIGNED:  # whole rows are cut, into runs that are about as long
        run = tl.maximum((pages_in_all + runs - 1) // runs, 1)
        shares = (pages + run - 1) // run
        ends = tl.cumsum(shares, 0)
        own = tl.sum((ends <= program).to(tl.int32), 0)  # none's, where there are more programs than runs
        length, each = of_row(r, lengths, own), of_row(r, pages, own)
        last_part = of_row(r, ends, own) - 1
        share = tl.maximum(of_row(r, shares, own), 1)
        first_part = last_part + 1 - share
        run = (each + share - 1) // share  # no longer, and as many
    if ROWWISE or ALIGNED:
        first = (program - first_part) * run
        stop = tl.minimum(first + run, each)
    else:
        if not EVEN:
            ends = tl.cumsum(pages, 0)
        run = (pages_in_all + programs - 1) // programs
        first, stop = program * run, tl.minimum(program * run + run, pages_in_all)
    if first < stop:
        m, d, dv, n = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, PAGE)
        inside, in_d, in_dv = m < HERE, d < D, dv < DV
        held = inside[:, None] & in_dv[None, :]
        if ROWWISE or ALIGNED:
            first_row, last_row = own, own
        elif EVEN:
            first_row, last_row = first // each, (stop - 1) // each
        else:
            first_row = tl.sum((ends <= first).to(tl.int32), 0)
            last_row = tl.sum((ends <= stop - 1).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            if ROWWISE or ALIGNED:
                row_stop, row_first = each, 0
            elif EVEN:
                row_stop, row_first = (row + 1) * each, row * each
            else:
                length = of_row(r, lengths, row)
                row_stop = of_row(r, ends, row)
                row_first = row_stop - of_row(r, pages, row)
            begin = tl.maximum(first, row_first) - row_first
            end = tl.minimum(tl.minimum(stop, row_stop) - row_first, (length + PAGE - 1) // PAGE)
            q = tl.load(
                q_ptr + row * QUERIES * D + m[:, None] * D + d[None, :],
                mask=inside[:, None] & in_d[None, :], other=0.0,
            )  # fmt: skip
            if CAUSAL:
                seen = ends_of(length, m, STEPS)
            if WINDOWED:
                gone = oldest(query_position_ptr, row, m, window, HEADS, STEPS)
            top = tl.full([M], float("-inf"), tl.float32)
            total = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, DVP], tl.float32)
            for index in tl.range(begin, end, num_stages=STAGES):
                page = tl.load(table_ptr + row * width + index).to(tl.int64)
                k_at = k_ptr + page * (PAGE * D) + n[:, None] * D + d[None, :]
                v_at = v_ptr + page * (PAGE * DV) + n[:, None] * DV + dv[None, :]
                k = tl.load(k_at) if DP == D else tl.load(k_at, mask=in_d[None, :], other=0.0)
                v = tl.load(v_at) if DVP == DV else tl.load(v_at, mask=in_dv[None, :], other=0.0)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                if CAPPED:
                    logits = capped(logits, cap)
                if HAS_BIAS:
                    logits += tl.load(bias_ptr + page * PAGE + n)[None, :] * _LOG2E
                there = (index * PAGE + n)[None, :] < (seen[:, None] if CAUSAL else length)
                if WINDOWED:
                    there &= tl.load(position_ptr + page * PAGE + n)[None, :] > gone[:, None]
                logits = tl.where(there, logits, float("-inf"))
                high = tl.maximum(top, tl.max(logits, 1))
                base = tl.where(high == float("-inf"), 0.0, high)
                weights = tl.exp2(logits - base[:, None])
                shrink = tl.exp2(top - base)
                total = total * shrink + tl.sum(weights, 1)
                acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
                top = high
            if LATE:
                let_others(EARLY)
            safe = tl.where(total > 0, total, 1.0)
            lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
            if not (ROWWISE or ALIGNED):
                first_part, last_part = row_first // run, (row_stop - 1) // run  # programs that share this row
            if first_part == last_part:
                tl.store(
                    out_ptr + row * QUERIES * DV + m[:, None] * DV + dv[None, :],
                    (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=held,
                )  # fmt: skip
                tl.store(lse_ptr + row * QUERIES + m, lse * LN2, mask=inside)
            else:
                slot = (program + row) * QUERIES  # a part's own: both grow, and one of them with every part
                tl.store(part_ptr + slot * DV + m[:, None] * DV + dv[None, :], acc / safe[:, None], mask=held)
                tl.store(part_lse_ptr + slot + m, lse, mask=inside)
                tl.debug_barrier()  # all of this program's part is written before it says so
                settle(
                    out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, turn_ptr, program, row, first_part,
                    last_part, QUERIES, HERE, QP, DV, DVP, PARTS, HELPERS, POLLS,
                )  # fmt: skip


def read(
    q: Tensor, paged: Paged, scale: float, plan: ReadPlan | None, *, causal: bool = False, window: int | None = None,
    positions: Tensor | None = None, cap: float | None = None, warps: int = 0, stages: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kvthrift.kernels.paged.paged_attend`; ``warps`` and ``stages`` are for measuring."""
    b, heads, length, dim = q.shape
    rows, width = paged.table.shape
    value_dim = paged.values.shape[-1]
    queries = heads * b * length // rows
    plan = plan or plan_read(rows, rows * width, queries, value_dim, q.device)
    out = torch.empty(b, heads, length, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, length, dtype=torch.float32, device=q.device)
    deep, wide = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    sight, bias = features(q, rows, causal, window, positions, cap), paged.bias
    helpers = min(plan.helpers, wide // NARROWEST)
    stages = stages or _stages(paged, plan)
    for first, here in blocks(queries, sight["STEPS"], _most(paged, max(deep, wide))):
        tall, grouped = max(16, triton.next_power_of_2(here)), triton.next_power_of_2(here)
        _read[(plan.grid,)](
            behind(q.contiguous(), first), paged.keys, paged.values, paged.keys if bias is None else bias, paged.table,
            paged.lengths, behind(out, first), behind(lse, first, 1), behind(plan.parts, first),
            behind(plan.lses, first, 1), plan.arrived, plan.turns, paged.positions if window is not None else None,
            scale=scale * LOG2E, width=width, rows=rows, runs=plan.programs, **sight,
            ROWS=triton.next_power_of_2(rows), QUERIES=queries, HERE=here, M=tall, D=dim, DP=deep, DV=value_dim,
            DVP=wide, QP=grouped, PARTS=max(1, _JOINED // (grouped * wide)), PAGE=paged.page,
            EVEN=plan.even, ROWWISE=plan.even and plan.programs % rows == 0, ALIGNED=plan.aligned,
            HELPERS=helpers, POLLS=plan.polls, HAS_BIAS=bias is not None,
            STAGES=stages, LATE=plan.late,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=warps or _warps(q, tall, max(deep, wide)), **launch(q.device),
        )  # fmt: skip
    return out, lse


def _most(paged: Paged, dim: int) -> int:
    """Queries of one program, at most: registers have room for them, and shared memory beside a page."""
    if paged.keys.dtype == torch.float32:
        return _MOST // 4 // dim if dim > 32 else _MANY
    return min(_MANY, _MOST // dim // (2 if dim > 128 and _room(paged) < 3 else 1))


def _warps(q: Tensor, tall: int, dim: int) -> int:
    """As few as have the registers."""
    if tall > 64 or tall * dim > 64 * 128:
        return 8
    return 2 if q.element_size() == 2 and tall * dim <= 16 * 128 else 4


def _stages(paged: Paged, plan: ReadPlan) -> int:
    """Of the loop over pages: its table's entries are loaded as long before pages are as those before they are used."""
    ahead = min(_AHEAD if plan.even else _AHEAD - 1, _room(paged) // 2) if plan.few else 0
    return 2 * ahead + 1 if ahead else 2


def _room(paged: Paged) -> int:
    """Pages, of keys and values, that fit into a multiprocessor's shared memory."""
    page = paged.page * (paged.keys.shape[-1] + paged.values.shape[-1]) * paged.keys.element_size()
    if not paged.keys.is_cuda:
        return 2 * _AHEAD
    device = torch.cuda.get_device_properties(paged.keys.device)
    held = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return int(held) * 7 // 8 // page
