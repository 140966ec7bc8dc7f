"""What queries see of a page, and how their logits are bent: shared by the kernels that read pages.

Which of it a kernel does is settled when it is compiled, so that a plain read pays for none of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
_TWICE_LOG2E = tl.constexpr(2 * LOG2E)


@triton.jit
def capped(logits, cap):
    """``cap * tanh(logits / cap)``, both in base two; nothing can overflow, and there is no tanh to call."""
    fall = tl.exp2(tl.abs(logits) * (-_TWICE_LOG2E / cap))
    bent = cap * (1.0 - fall) / (1.0 + fall)
    return tl.where(logits < 0, -bent, bent)


@triton.jit
def oldest(query_position_ptr, row, m, window, HEADS: tl.constexpr, STEPS: tl.constexpr):
    """``[M]`` the newest position that is out of each query's window."""
    return tl.load(query_position_ptr + (row // HEADS) * STEPS + m % STEPS) - window


@triton.jit
def ends_of(length, m, STEPS: tl.constexpr):
    """``[M]`` how many entries each query sees where a row's last ``STEPS`` are the queries' own."""
    return length - (STEPS - 1) + m % STEPS


def features(
    q: Tensor, rows: int, causal: bool, window: int | None, positions: Tensor | None, cap: float | None
) -> dict[str, Any]:
    """The arguments of a kernel that say what queries see; what is not asked for is no argument at all."""
    found: dict[str, Any] = {"query_position_ptr": None, "window": None, "cap": None}
    if window is not None and positions is not None:
        found |= {"query_position_ptr": positions.to(torch.int32).contiguous(), "window": window}
    if cap is not None:
        found["cap"] = cap * LOG2E
    steps = {"STEPS": q.shape[2], "HEADS": rows // q.shape[0]} if causal or window is not None else {}
    flags = {"CAUSAL": causal, "WINDOWED": window is not None, "CAPPED": cap is not None}
    return {**found, **flags, "STEPS": 1, "HEADS": 1, **steps}


def blocks(queries: int, steps: int, most: int) -> list[tuple[int, int]]:
    """Where each launch begins and how many queries it has: whole query heads, and no more than ``most`` queries.

    More queries would not fit a program's registers, so that pages are read again for them.
    """
    each = max(most // steps, 1) * steps
    return [(first, min(each, queries - first)) for first in range(0, queries, each)]


def behind(x: Tensor, first: int, width: int = 0) -> Tensor:
    """``x`` from the query ``first`` of its first row on; ``width`` numbers a query, or as many as its last dim."""
    return x.view(-1)[first * (width or x.shape[-1]) :] if first else x
