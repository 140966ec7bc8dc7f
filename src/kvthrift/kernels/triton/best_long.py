"""Which of a long row's numbers are its largest: the threshold is found a byte at a time, by many programs a row.

Each round counts how often every value of the next byte occurs among the numbers that begin like the threshold; whole
numbers add up to the same whatever their order. Ties at the threshold go to the lowest index: the last round's counts
are kept piece by piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.best import _ordered

_ROUNDS = tl.constexpr(4)
_VALUES = tl.constexpr(256)
_LEAST = tl.constexpr(-2147483648)
_PIECE, _MOST_PIECES = 2048, 2048


@triton.jit
def _byte(hist_ptr, wanted):
    """The byte that ``wanted`` numbers reach, and how many of those that have it are wanted."""
    d = tl.arange(0, _VALUES)
    counts = tl.load(hist_ptr + d)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    found = tl.sum((above + counts >= wanted).to(tl.int32), 0) - 1
    return found, wanted - tl.sum(tl.where(d > found, counts, 0), 0)


@triton.jit
def _count(score_ptr, count_ptr, hist_ptr, part_ptr, entries, ROUND: tl.constexpr, N: tl.constexpr):
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, d = piece * N + tl.arange(0, N), tl.arange(0, _VALUES)
    inside, hist = n < entries, hist_ptr + row * (_ROUNDS * _VALUES)
    value = _ordered(score_ptr + row * entries + n, inside) ^ _LEAST
    if ROUND > 0:
        left = tl.load(count_ptr + row).to(tl.int32)
        bound = left * 0
        for earlier in tl.static_range(ROUND):
            found, left = _byte(hist + earlier * _VALUES, left)
            bound |= found << (24 - 8 * earlier)
        inside = inside & (((value ^ bound) >> (32 - 8 * ROUND)) == 0)
    counts = tl.histogram((value >> (24 - 8 * ROUND)) & 255, _VALUES, mask=inside)
    tl.atomic_add(hist + ROUND * _VALUES + d, counts, mask=counts > 0, sem="relaxed")
    if ROUND == _ROUNDS - 1:
        tl.store(part_ptr + (row * tl.num_programs(0) + piece) * _VALUES + d, counts)


@triton.jit
def _kept(score_ptr, count_ptr, hist_ptr, part_ptr, keep_ptr, entries, P: tl.constexpr, N: tl.constexpr):
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted = tl.load(count_ptr + row).to(tl.int32)
    left, found, bound = wanted, wanted * 0, wanted * 0
    for earlier in tl.static_range(_ROUNDS):
        found, left = _byte(hist_ptr + (row * _ROUNDS + earlier) * _VALUES, left)
        bound |= found << (24 - 8 * earlier)
    p = tl.arange(0, P)
    at = part_ptr + (row * tl.num_programs(0) + p) * _VALUES + found
    before = tl.sum(tl.load(at, mask=p < piece, other=0), 0)
    n = piece * N + tl.arange(0, N)
    inside, bound = n < entries, bound ^ _LEAST
    value = _ordered(score_ptr + row * entries + n, inside)
    tied = (inside & (value == bound)).to(tl.int32)
    keep = (value > bound) | ((tied != 0) & (before + tl.cumsum(tied, 0) <= left))
    tl.store(keep_ptr + row * entries + n, keep & (wanted > 0), mask=inside)


def best(scores: Tensor, counts: Tensor, piece: int = 0) -> Tensor:
    """See :func:`kvthrift.kernels.best.best`; a program takes ``piece`` numbers of a row."""
    entries = scores.shape[-1]
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    wanted = counts.expand(scores.shape[:-1]).contiguous().long().clamp(max=entries)
    rows, scores = wanted.numel(), scores.contiguous()
    piece = piece or (_PIECE if -(-entries // _PIECE) * rows <= _MOST_PIECES else 4 * _PIECE)
    pieces = -(-entries // piece)
    hist = torch.zeros(rows, _ROUNDS.value, _VALUES.value, dtype=torch.int32, device=scores.device)
    part = torch.empty(rows, pieces, _VALUES.value, dtype=torch.int32, device=scores.device)
    grid = (pieces, rows)
    for turn in range(_ROUNDS.value):
        _count[grid](scores, wanted, hist, part, entries, ROUND=turn, N=piece, num_warps=piece // 512)
    _kept[grid](
        scores, wanted, hist, part, keep, entries, P=triton.next_power_of_2(pieces), N=piece, num_warps=piece // 512
    )
    return keep
