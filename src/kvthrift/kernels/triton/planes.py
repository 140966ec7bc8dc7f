"""A byte holds one number of each of ``PLANES`` runs of channels: what a read in few bits does for one such run.

Products have the entries or channels of a page on the left, and the queries, which are few, on the right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvthrift.kernels.triton.unpack import lifted, numbers


@triton.jit
def query(q_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr, HERE: tl.constexpr,
          M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """``[DP, M]`` the queries' channels of a plane; zero beyond."""
    m, d = tl.arange(0, M), tl.arange(0, DP)
    at = q_ptr + row * QUERIES * D + m[None, :] * D + PLANE * (D // PLANES) + d[:, None]
    return tl.load(at, mask=(m < HERE)[None, :] & (d < D // PLANES)[:, None], other=0.0)


@triton.jit
def product(
    logits, codes, q, scale_ptr, middle_ptr, page, PLANE: tl.constexpr, PLANES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``logits [PAGE, M]`` and what a plane's channels add; the queries' part with the middles, ``[M]``."""
    CENTRE: tl.constexpr = lifted(BITS, q.dtype) - 0.5
    d = tl.arange(0, DP)
    at = page * D + PLANE * (D // PLANES) + d
    inside = d < D // PLANES
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    keys = numbers(codes, PLANE, BITS, FLOATING, PACKED, q.dtype)
    scaled = (q.to(tl.float32) * scale[:, None]).to(q.dtype)
    logits = tl.dot(keys, scaled, logits, input_precision=PRECISION)
    if PACKED and BITS < 8:  # the very numbers that the product has too much, so that nothing of them is left
        logits = tl.dot(tl.full(keys.shape, CENTRE, q.dtype), scaled, logits, input_precision=PRECISION)
    if FLOATING:
        return logits, tl.zeros([q.shape[1]], tl.float32)
    middle = tl.load(middle_ptr + at, mask=inside, other=0.0).to(tl.float32) + 0.5 * scale
    return logits, tl.sum(q.to(tl.float32) * middle[:, None], 0)


@triton.jit
def weigh(weights, shrink, offset, scale, middle_ptr, BITS: tl.constexpr, FLOATING: tl.constexpr,
          PACKED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Weights ``[PAGE, M]`` with a group's scales in them, and what all its channels get alike, ``[M]``."""
    scaled = (weights * scale[:, None]).to(tl.bfloat16 if PACKED else dtype)  # wide enough for both
    offset = offset * shrink
    if not FLOATING:
        middle = tl.load(middle_ptr).to(tl.float32)
        below = lifted(BITS, tl.bfloat16) if PACKED and BITS < 8 else 0.5
        offset += tl.sum(weights * middle[:, None] + scaled.to(tl.float32) * below, 0)
    return scaled, offset


@triton.jit
def gather(acc, codes, weights, shrink, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
           PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc [DVP, M]`` shrunk, and the weighted values of a plane's channels."""
    values = numbers(codes, PLANE, BITS, FLOATING, PACKED, weights.dtype)
    return tl.dot(values, weights, acc * shrink[None, :], input_precision=PRECISION)


@triton.jit
def tail_keys(tail_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
              DP: tl.constexpr):  # fmt: skip
    """``[PAGE, DP]`` a plane's channels of a row's last page."""
    n, d = tl.arange(0, PAGE), tl.arange(0, DP)
    at = tail_ptr + row * (PAGE * D) + n[:, None] * D + PLANE * (D // PLANES) + d[None, :]
    return tl.load(at, mask=(d < D // PLANES)[None, :], other=0.0)


@triton.jit
def tail_values(tail_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
                DP: tl.constexpr):  # fmt: skip
    """``[DP, PAGE]`` a plane's channels of a row's last page."""
    n, d = tl.arange(0, PAGE), tl.arange(0, DP)
    at = tail_ptr + row * (PAGE * D) + n[None, :] * D + PLANE * (D // PLANES) + d[:, None]
    return tl.load(at, mask=(d < D // PLANES)[:, None], other=0.0)


@triton.jit
def leave(ptr, at, acc, offset, safe, PLANE: tl.constexpr, PLANES: tl.constexpr, HERE: tl.constexpr,
          M: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """Write a plane's channels of an output that begins at ``at``."""
    m, d = tl.arange(0, M), tl.arange(0, DVP)
    out = (acc + offset[None, :]) / safe[None, :]
    where = ptr + at * DV + m[None, :] * DV + PLANE * (DV // PLANES) + d[:, None]
    tl.store(where, out.to(ptr.dtype.element_ty), mask=(m < HERE)[None, :] & (d < DV // PLANES)[:, None])


@triton.jit
def softmax(logits, top, total):
    """Weights ``[PAGE, M]`` under a running maximum, and the running numbers."""
    high = tl.maximum(top, tl.max(logits, 0))
    base = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(logits - base[None, :])
    shrink = tl.exp2(top - base)
    return weights, shrink, high, total * shrink + tl.sum(weights, 0)


@triton.jit
def within(logits, position_ptr, page, gone, PAGE: tl.constexpr):
    """``[PAGE, M]`` without the entries that are no newer than ``gone [M]``."""
    positions = tl.load(position_ptr + page * PAGE + tl.arange(0, PAGE))
    return tl.where(positions[:, None] > gone[None, :], logits, float("-inf"))
