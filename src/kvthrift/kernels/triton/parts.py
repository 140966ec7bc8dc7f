"""What reads and appends share: the last of several programs joins a row's parts by log-sum-exp; launching early.

From compute capability 9.0 on a kernel may be launched while the one before it still runs (programmatic dependent
launch), and waits at its own beginning: what a launch costs is hidden, in a CUDA graph too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


def launch(device: torch.device) -> dict[str, Any]:
    """How a kernel that calls :func:`await_others` first is launched on a device."""
    early = device.type == "cuda" and _capability(device.index) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@triton.jit
def await_others(EARLY: tl.constexpr, LET: tl.constexpr = True):
    """What was launched before is done from here on; what is launched next may come and wait, if it is let."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if LET:
        let_others(EARLY)


@triton.jit
def let_others(EARLY: tl.constexpr):
    """What is launched next may come and wait."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def of_row(r, values, row):  # fmt: skip
    """The value of one row, held in registers."""
    return tl.sum(tl.where(r == row, values, 0), 0)


@triton.jit
def join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part,
    QUERIES: tl.constexpr, HERE: tl.constexpr, QP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PARTS: tl.constexpr, first_channel=0,
):  # fmt: skip
    """Write what the parts ``first_part .. last_part`` of a row come to, ``PARTS`` of them at a time.

    The ``DVP`` channels from ``first_channel`` on.
    """
    g, p, dv = tl.arange(0, QP), tl.arange(0, PARTS), first_channel + tl.arange(0, DVP)
    in_dv = dv < DV
    top = tl.full([QP], float("-inf"), tl.float32)
    total = tl.zeros([QP], tl.float32)
    acc = tl.zeros([QP, DVP], tl.float32)
    for other in range(first_part, last_part + 1, PARTS):
        slots = (other + p + row) * QUERIES
        there = (other + p <= last_part)[:, None] & (g < HERE)[None, :]
        lses = tl.load(
            part_lse_ptr + slots[:, None] + g[None, :], mask=there, other=float("-inf"), cache_modifier=".cg"
        )  # fmt: skip
        parts = tl.load(
            part_ptr + (slots[:, None] + g[None, :])[:, :, None] * DV + dv[None, None, :],
            mask=there[:, :, None] & in_dv[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        high = tl.maximum(top, tl.max(lses, 0))
        base = tl.where(high == float("-inf"), 0.0, high)
        weight = tl.exp2(lses - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weight[:, :, None], 0)
        top = high
    safe = tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + row * QUERIES * DV + g[:, None] * DV + dv[None, :],
        (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=(g < HERE)[:, None] & in_dv[None, :],
    )  # fmt: skip
    lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
    tl.store(lse_ptr + row * QUERIES + g, lse * LN2, mask=g < HERE)
