"""A unit holds one number of each of ``PLANES`` runs of channels: what a read in few bits does for one such run.

Products have the entries or channels of a page on the left, and the queries, which are few, on the right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvthrift.kernels.triton.unpack import numbers, planes_of, rise, step

ROOM = tl.constexpr(9)  # exponents between the largest product of a weight and 1


@triton.jit
def channels(PLANES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """``[PLANES * DP]`` channels, a plane after the other, and which of them there are."""
    k = tl.arange(0, PLANES * DP)
    return k // DP * (D // PLANES) + k % DP, k % DP < D // PLANES


@triton.jit
def queries_of(q_ptr, row, PLANES: tl.constexpr, QUERIES: tl.constexpr, HERE: tl.constexpr, M: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """``[PLANES * DP, M]`` the queries' channels, a plane after the other; zero beyond."""
    m = tl.arange(0, M)
    d, there = channels(PLANES, D, DP)
    at = q_ptr + row * QUERIES * D + m[None, :] * D + d[:, None]
    return tl.load(at, mask=(m < HERE)[None, :] & there[:, None], other=0.0)


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
def marks_of(ptr, gap, at, there, WHOLE: tl.constexpr, FLOATING: tl.constexpr):
    """Scales and least numbers, ``gap`` behind them; in one load, which is wide enough to pass the L1 cache by."""
    if FLOATING:
        scale = tl.load(ptr + at) if WHOLE else tl.load(ptr + at, mask=there, other=0.0)
        return scale, scale
    both = ptr + tl.arange(0, 2)[:, None] * gap + at[None, :]
    return tl.split(tl.permute(tl.load(both) if WHOLE else tl.load(both, mask=there[None, :], other=0.0), (1, 0)))


@triton.jit
def reach_of(scale):
    """About the binary logarithm of float16 scales, 0.09 below it at most; that of the least float16 of a 0."""
    bits = tl.maximum(scale.to(tl.float32), 2.0**-24).to(tl.int32, bitcast=True)
    return bits.to(tl.float32) * 2.0**-23 - 127.0


@triton.jit
def deep(x):
    """``[N, M]`` as ``[N / 8, 8, M]``: a thread has what the first of these counts, and reduces it by itself."""
    return tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]])


@triton.jit
def levels(codes, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """Units ``[N, C]`` to numbers ``[N, PLANES * C]``, a plane after the other."""
    if planes_of(BITS) == 1:
        return numbers(codes, 0, BITS, FLOATING, PACKED, dtype)
    else:
        first = numbers(codes, 0, BITS, FLOATING, PACKED, dtype)
        second = numbers(codes, 1, BITS, FLOATING, PACKED, dtype)
        third = numbers(codes, 2, BITS, FLOATING, PACKED, dtype)
        fourth = numbers(codes, 3, BITS, FLOATING, PACKED, dtype)
        planes = tl.permute(tl.join(tl.join(first, third), tl.join(second, fourth)), (0, 2, 3, 1))  # [N, 2, 2, C]
        return tl.reshape(planes, [codes.shape[0], 4 * codes.shape[1]])


@triton.jit
def product(
    codes, q, stepped, scale, low, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``[PAGE, M]`` products of keys with queries, yet to be raised, and what the least numbers add, ``[8, M]``.

    ``stepped`` are the queries, each divided by its plane's step.
    """
    scaled = stepped * scale[:, None].to(q.dtype)
    logits = tl.dot(levels(codes, BITS, FLOATING, PACKED, q.dtype), scaled, input_precision=PRECISION)
    if FLOATING:
        return logits, tl.zeros([8, q.shape[1]], tl.float32)
    wide = tl.broadcast_to(low[None, :].to(q.dtype), [16, q.shape[0]])
    return logits, tl.max(deep(tl.dot(wide, q, input_precision=PRECISION)), 0)


@triton.jit
def weigh(weights, shrink, offset, scale, low, FLOATING: tl.constexpr, dtype: tl.constexpr):
    """Weights ``[N, M]`` with a group's scales in them, and what the least numbers add, ``[8, M]``."""
    N: tl.constexpr = scale.shape[0]
    scales = tl.reshape(scale.to(tl.float32), [N // 8, 8])[:, :, None]
    scaled = tl.reshape((weights * scales).to(dtype), [N, weights.shape[2]])
    if not FLOATING:
        lows = tl.reshape(low.to(tl.float32), [N // 8, 8])[:, :, None]
        offset = offset * shrink[None, :] + tl.sum(weights * lows, 0)
    return scaled, offset


@triton.jit
def gather(acc, codes, weights, shrink, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
           PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc [DVP, M]`` shrunk, and the weighted numbers of a plane's channels."""
    values = numbers(codes, PLANE, BITS, FLOATING, PACKED, weights.dtype)
    return tl.dot(values, weights, acc * shrink[None, :], input_precision=PRECISION)


@triton.jit
def settled(acc, offset, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
            PACKED: tl.constexpr):  # fmt: skip
    """What was gathered of a plane in units of the values' own."""
    if FLOATING:
        return acc
    return acc * (rise(FLOATING, PACKED) / step(BITS, PLANE, PACKED)) + tl.sum(offset, 0)[None, :]


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
def softmax(logits, factor, fixed, top, total, scale):
    """Weights ``[N / 8, 8, M]`` under a running maximum, and the running numbers; ``total`` is ``[8, M]``.

    A logit is ``logits * factor + fixed``, of which the latter is ``[8, M]``, alike for all entries. ``scale [N]`` is
    float16, what an entry's weight is multiplied with: products stay below ``2 ** (ROOM + 0.1)``, so that float16 has
    them, and what it lacks is nothing beside the largest.
    """
    reach = reach_of(tl.max(deep(tl.broadcast_to(scale[:, None], logits.shape)), 0))  # [8, M], a thread's own
    high = tl.maximum(top, tl.max(tl.max(deep(logits), 0) * factor + fixed + reach, 0))
    base = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(deep(logits) * factor + (fixed - (base - ROOM)[None, :])[None, :, :])
    shrink = tl.exp2(top - base)
    return weights, shrink, high, total * shrink[None, :] + tl.sum(weights, 0)


@triton.jit
def within(logits, position_ptr, page, gone, n, PAGE: tl.constexpr):
    """``[PAGE, M]`` without the entries that are no newer than ``gone [M]``."""
    positions = tl.load(position_ptr + page * PAGE + n)
    return tl.where(positions[:, None] > gone[None, :], logits, float("-inf"))
