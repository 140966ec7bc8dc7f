"""Which of a row's numbers are its largest, without sorting: the threshold is found two bits at a time.

A float's bits, those of negative ones turned round, are in the order of the floats. A row is counted 16 times where it
lies, in the L2 cache; ties at the threshold go to the lowest index by a running count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LONGEST_STEP = 16384


@triton.jit
def _ordered(at, mask):
    """Integers in the order of the floats, minus zero as zero, NaN above all; the least of them where there is none."""
    value = tl.load(at, mask=mask, other=0.0) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FC00000, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where(mask, bits, -2147483647)


@triton.jit
def _best(score_ptr, count_ptr, keep_ptr, entries, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(count_ptr + row).to(tl.int32)
    scores, n = score_ptr + row * entries, tl.arange(0, N)
    least = wanted * 0 - 2147483647  # becomes the largest integer that `wanted` scores reach
    for digit in range(16):
        unit = (wanted * 0 + 1) << (30 - 2 * digit)
        one, two, three = wanted * 0, wanted * 0, wanted * 0
        for start in range(0, entries, N):
            value = _ordered(scores + start + n, start + n < entries)
            one += tl.sum((value >= least + unit).to(tl.int32), 0)
            two += tl.sum((value >= least + 2 * unit).to(tl.int32), 0)
            three += tl.sum((value >= least + 3 * unit).to(tl.int32), 0)
        reached = (one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32)
        least += reached * unit
    above = wanted * 0
    for start in range(0, entries, N):
        above += tl.sum((_ordered(scores + start + n, start + n < entries) > least).to(tl.int32), 0)
    ties = wanted * 0
    for start in range(0, entries, N):
        inside = start + n < entries
        value = _ordered(scores + start + n, inside)
        tied = ((value == least) & inside).to(tl.int32)
        keep = (value > least) | ((tied != 0) & (above + ties + tl.cumsum(tied, 0) <= wanted))
        tl.store(keep_ptr + row * entries + start + n, keep & (wanted > 0), mask=inside)
        ties += tl.sum(tied, 0)


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """See :func:`kvthrift.kernels.best.best`."""
    entries = scores.shape[-1]
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    wanted = counts.expand(scores.shape[:-1]).contiguous().long().clamp(max=entries)
    step = min(_LONGEST_STEP, triton.next_power_of_2(entries))
    _best[(wanted.numel(),)](scores.contiguous(), wanted, keep, entries, N=step, num_warps=16 if step > 4096 else 4)
    return keep
