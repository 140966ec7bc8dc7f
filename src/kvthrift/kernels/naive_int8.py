"""Queries and keys rounded to 8 bits, written out in torch: the twin of ``triton/quantize.py``, which says why.

Knows nothing of what is done with the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

KEY_BLOCK = 8  # entries that share a scale
RUN = 64  # channels that are turned together
_FAR = 90.0  # powers of two that an entry's factor may be off one: sums of weights over it stay within float32
_LOG2E = 1.4426950408889634


class Rounded(NamedTuple):
    """Vectors whose products are logits but for a number of each query and one of each entry.

    The logit of query i and entry n is ``scale * queries_i . keys_n + offsets_i + shifts_n``.

    Attributes:
        queries, keys: ``[B, HG, Q, D or more]``, ``[B, H, T, D or more]`` float32 multiples of their scales.
        offsets, shifts: ``[B, HG, Q]``, ``[B, HG, T]`` float32.
    """

    queries: Tensor
    keys: Tensor
    offsets: Tensor
    shifts: Tensor


def turn(size: int) -> Tensor:
    """``[size, size]`` of ones and minus ones, any two rows at right angles; ``size`` a power of two up to 64.

    A Hadamard matrix whose rows have the signs of a bent function, which is as unlike each of its columns as can be.
    """
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat((torch.cat((made, made), dim=1), torch.cat((made, -made), dim=1)))
    i = torch.arange(size)
    pairs = (i & (i >> 1) & 1) + (i >> 2 & (i >> 3) & 1) + (i >> 4 & (i >> 5) & 1)
    return made * (1 - 2 * (pairs % 2))[:, None]


def mean_of(sums: Tensor, use: Tensor) -> Tensor:
    """Sums ``[B, H, D]`` over the rows in ``use [B, H, N]`` by their number."""
    return sums / use.sum(dim=-1, keepdim=True).clamp(min=1)


def in_reach(shifts: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., 1]`` each: how much of shifts ``[..., T]`` (in powers of two) float32 has room for, and their middle."""
    high, low = shifts.amax(dim=-1, keepdim=True), shifts.amin(dim=-1, keepdim=True)
    return (2 * _FAR / (high - low).clamp(min=1e-30)).clamp(max=1.0), (high + low) / 2


def turned(x: Tensor) -> Tensor:
    """Runs of channels of ``x [..., D]``, zeros up to a power of two behind them, times :func:`turn`."""
    width = max(32, 1 << (x.shape[-1] - 1).bit_length())
    run = min(width, RUN)
    x = F.pad(x, (0, width - x.shape[-1]))
    return (x.view(*x.shape[:-1], -1, run) @ turn(run).to(x.device)).flatten(-2)


def levels(x: Tensor, most: Tensor) -> Tensor:
    """``x`` as the nearest of 255 multiples of ``most / 127``, in float32."""
    return (x * (127 / most.clamp(min=1e-30))).round() * (most / 127)


def rounded(q: Tensor, k: Tensor, q_positions: Tensor, valid: Tensor, scale: float, power: int) -> Rounded:
    """Queries and keys in 8 bits; arguments as for :func:`kvthrift.kernels.observe.power_sums`."""
    group, entries = q.shape[1] // k.shape[1], k.shape[2]
    there = (q_positions >= 0)[:, None, :, None]
    queries = q.float().masked_fill(~there, 0.0)
    keys = k.float().masked_fill(~valid[..., None], 0.0)
    mean = mean_of(keys.sum(dim=2), valid)[:, :, None]
    middle = mean_of(queries.sum(dim=2), there[..., 0])[:, :, None]
    wide = mean.repeat_interleave(group, dim=1)
    keys = (keys - mean).masked_fill(~valid[..., None], 0.0)
    shifts = scale * (keys.repeat_interleave(group, dim=1) @ middle.transpose(-1, -2))[..., 0]
    part = in_reach(shifts * (_LOG2E * power))[0]
    centre = in_reach(shifts)[1]
    offsets = scale * (queries * wide).sum(dim=-1) + part * centre
    queries = (queries - middle * part[..., None]).masked_fill(~there, 0.0)
    queries, keys = turned(queries), turned(keys)
    most = F.pad(keys.abs().amax(dim=-1), (0, -entries % KEY_BLOCK))  # [B, H, blocks * KEY_BLOCK]
    most = most.view(*most.shape[:2], -1, KEY_BLOCK).amax(dim=-1).repeat_interleave(KEY_BLOCK, dim=-1)
    run = min(keys.shape[-1], RUN)
    return Rounded(
        levels(queries, queries.abs().amax(dim=-1, keepdim=True)),
        levels(keys, most[..., :entries, None]) / run,
        offsets,
        part * (shifts - centre),
    )
