"""A byte holds one number of each of ``PLANES`` runs of channels: what a read in few bits does for one such run.

Products have the entries or channels of a page on the left, and the queries, which are few, on the right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvthrift.kernels.triton.unpack import centre, numbers, rise, step

ROOM = tl.constexpr(9)  # exponents between the largest product of a weight and 1


@triton.jit
def query(q_ptr, row, PLANE: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr, HERE: tl.constexpr,
          M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """``[DP, M]`` the queries' channels of a plane; zero beyond."""
    m, d = tl.arange(0, M), tl.arange(0, DP)
    at = q_ptr + row * QUERIES * D + m[None, :] * D + PLANE * (D // PLANES) + d[:, None]
    return tl.load(at, mask=(m < HERE)[None, :] & (d < D // PLANES)[:, None], other=0.0)


@triton.jit
def largest(q):
    """The largest number of a tensor."""
    return tl.max(tl.max(tl.abs(q.to(tl.float32)), 0), 0)


@triton.jit
def power_above(x):
    """The exponent of the least power of two that is not below ``x``; 0 of 0."""
    return tl.where(x > 0, tl.ceil(tl.log2(x)), 0.0)


@triton.jit
def product(
    logits, fixed, codes, q, scale_ptr, middle_ptr, page, PLANE: tl.constexpr, PLANES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``logits [PAGE, M]``, yet to be raised, and ``fixed [16, M]``, its rows alike, with what a plane's channels add.

    The queries are those of :func:`query`, divided by the plane's step.
    """
    d = tl.arange(0, DP)
    at = page * D + PLANE * (D // PLANES) + d
    inside = d < D // PLANES
    scale = tl.load(scale_ptr + at) if DP == D // PLANES else tl.load(scale_ptr + at, mask=inside, other=0.0)
    scaled = q * scale[:, None].to(q.dtype)
    logits = tl.dot(
        numbers(codes, PLANE, BITS, FLOATING, PACKED, q.dtype), scaled, logits, input_precision=PRECISION
    )  # fmt: skip
    if not FLOATING:
        middle = tl.load(middle_ptr + at) if DP == D // PLANES else tl.load(middle_ptr + at, mask=inside, other=0.0)
        summed = tl.dot(tl.full([16, DP], 1.0, q.dtype), scaled, input_precision=PRECISION)
        wide = tl.broadcast_to(middle[None, :].to(q.dtype), [16, DP])
        fixed += tl.dot(wide, q, input_precision=PRECISION) * step(BITS, PLANE, PACKED)
        fixed -= summed * centre(BITS, PLANE, PACKED)
    return logits, fixed


@triton.jit
def weigh(weights, shrink, offset, sums, scale, middle_ptr, FLOATING: tl.constexpr, dtype: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Weights ``[PAGE, M]`` with a group's scales in them, what the middles add ``[M]``, their own sums ``[16, M]``."""
    scaled = (weights * scale[:, None]).to(dtype)
    if not FLOATING:
        offset = offset * shrink + tl.sum(weights * tl.load(middle_ptr).to(tl.float32)[:, None], 0)
        ones = tl.full([16, weights.shape[0]], 1.0, dtype)
        sums = tl.dot(ones, scaled, sums * shrink[None, :], input_precision=PRECISION)
    return scaled, offset, sums


@triton.jit
def gather(acc, codes, weights, shrink, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
           PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc [DVP, M]`` shrunk, and the weighted numbers of a plane's channels."""
    values = numbers(codes, PLANE, BITS, FLOATING, PACKED, weights.dtype)
    return tl.dot(values, weights, acc * shrink[None, :], input_precision=PRECISION)


@triton.jit
def settled(acc, offset, sums, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
            PACKED: tl.constexpr):  # fmt: skip
    """What was gathered of a plane in units of the values' own."""
    if FLOATING:
        return acc
    CENTRE: tl.constexpr = centre(BITS, PLANE, PACKED)
    raised = acc * rise(FLOATING, PACKED) - tl.max(sums, 0)[None, :] * CENTRE
    return raised / step(BITS, PLANE, PACKED) + offset[None, :]


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
def leave(ptr, at, acc, safe, PLANE: tl.constexpr, PLANES: tl.constexpr, HERE: tl.constexpr,
          M: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """Write a plane's channels of an output that begins at ``at``."""
    m, d = tl.arange(0, M), tl.arange(0, DVP)
    out = acc / safe[None, :]
    where = ptr + at * DV + m[None, :] * DV + PLANE * (DV // PLANES) + d[:, None]
    tl.store(where, out.to(ptr.dtype.element_ty), mask=(m < HERE)[None, :] & (d < DV // PLANES)[:, None])


@triton.jit
def softmax(logits, top, total, reach):
    """Weights ``[PAGE, M]`` under a running maximum, and the running numbers.

    ``reach`` is the exponent of the largest number that weights are multiplied with: their products stay below
    ``2 ** ROOM``, so that float16 has them, and what it lacks is nothing beside the largest.
    """
    high = tl.maximum(top, tl.max(logits, 0) + reach)
    base = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(logits - (base - ROOM)[None, :])
    shrink = tl.exp2(top - base)
    return weights, shrink, high, total * shrink + tl.sum(weights, 0)


@triton.jit
def within(logits, position_ptr, page, gone, n, PAGE: tl.constexpr):
    """``[PAGE, M]`` without the entries that are no newer than ``gone [M]``."""
    positions = tl.load(position_ptr + page * PAGE + n)
    return tl.where(positions[:, None] > gone[None, :], logits, float("-inf"))
