"""Products of a few rows with several matrices in one launch, which reads every weight once.

The work is one sequence of tiles of ``NB`` output columns over all matrices; a program takes a run of whole tiles, each
in steps of ``BK`` along K, and nothing is shared between programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.linears import MOST_ROWS, Setting, tiles_of
from kvthrift.kernels.triton.parts import await_others, launch

_AHEAD = tl.constexpr(8)  # lines of 128 bytes of each row that are asked for before the input is there
_LINE = tl.constexpr(64)  # numbers of a line


@triton.jit
def _of(index, first, second, third, fourth, MANY: tl.constexpr):
    """The value of the matrix ``index``."""
    chosen = first
    if MANY > 1:
        chosen = tl.where(index == 1, second, chosen)
    if MANY > 2:
        chosen = tl.where(index == 2, third, chosen)
    if MANY > 3:
        chosen = tl.where(index == 3, fourth, chosen)
    return chosen


@triton.jit
def _ask_for(at):
    """Have the lines at such addresses brought into the L2 cache; nobody waits for them."""
    fetch: tl.constexpr = "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    tl.inline_asm_elementwise(fetch, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _linears(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    n0, n1, n2, n3, rows, x_stride, run,
    K: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr, MANY: tl.constexpr,
    BIASED: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (K + BK - 1) // BK
    EVEN: tl.constexpr = K % BK == 0
    m, n, k = tl.arange(0, M), tl.arange(0, NB), tl.arange(0, BK)
    t1 = (n0 + NB - 1) // NB  # the first tiles of the second matrix, and so on
    t2 = t1 + (n1 + NB - 1) // NB
    t3 = t2 + (n2 + NB - 1) // NB
    tiles = t3 + (n3 + NB - 1) // NB
    first = tl.program_id(0) * run
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    real = (m < rows)[:, None]  # the last row again, in place of what is not there, would be asked for by all at once
    for tile in range(first, tl.minimum(first + run, tiles)):
        which = (tile >= t1).to(tl.int32) + (tile >= t2).to(tl.int32) + (tile >= t3).to(tl.int32)
        columns = _of(which, n0, n1, n2, n3, MANY)
        base = (tile - _of(which, 0, t1, t2, t3, MANY)) * NB
        w_ptr = _of(which, w0_ptr, w1_ptr, w2_ptr, w3_ptr, MANY) + base.to(tl.int64) * K
        w_rows = w_ptr + (tl.minimum(n, columns - 1 - base) * K)[:, None]  # behind the last: the last again
        if EARLY and tile == first:  # weights do not change: their first part is on its way when the input is there
            _ask_for(w_rows + tl.minimum(tl.arange(0, _AHEAD) * _LINE, K - 1)[None, :])
            await_others(EARLY)  # in this order: who comes early may have to do with what was launched before this
        w_at = w_rows + k[None, :]
        acc = tl.zeros([M, NB], tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            there = (step * BK + k < K)[None, :]
            if EVEN and FULL:
                x = tl.load(x_at + step * BK)
            else:
                x = tl.load(x_at + step * BK, mask=real & there, other=0.0)
            if EVEN:
                w = tl.load(w_at + step * BK, eviction_policy="evict_first")
            else:
                w = tl.load(w_at + step * BK, mask=there, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(x, tl.trans(w), acc)
        c = base + n
        if BIASED != 0:
            b_ptr = _of(which, b0_ptr, b1_ptr, b2_ptr, b3_ptr, MANY)
            bias = tl.load(b_ptr + c, mask=c < tl.where((BIASED >> which) & 1 != 0, columns, 0), other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_at = _of(which, y0_ptr, y1_ptr, y2_ptr, y3_ptr, MANY) + m.to(tl.int64)[:, None] * columns + c[None, :]
        tl.store(y_at, acc.to(y0_ptr.dtype.element_ty), mask=real & (c < columns)[None, :])


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], setting: Setting) -> list[Tensor]:
    """See :func:`kvthrift.kernels.linears.linears`."""
    rows, depth = x.shape
    sizes = [len(w) for w in weights]
    outs = [torch.empty(rows, size, dtype=x.dtype, device=x.device) for size in sizes]
    _linears[(-(-tiles_of(sizes, setting.columns) // setting.run),)](
        x, *_four(weights), *_four([x if b is None else b for b in biases]), *_four(outs),
        *sizes, *[0] * (4 - len(sizes)), rows, x.stride(0), setting.run,
        K=depth, M=MOST_ROWS, NB=setting.columns, BK=setting.depth, MANY=len(sizes),
        BIASED=sum(1 << i for i, b in enumerate(biases) if b is not None), STAGES=setting.stages,
        FULL=rows == MOST_ROWS, num_warps=setting.warps, **launch(x.device),
    )  # fmt: skip
    return outs


def _four(given: Sequence[Tensor]) -> list[Tensor]:
    """The first stands for those that there are not."""
    return [*given, *[given[0]] * (4 - len(given))]
