"""A linear and a quadratic form of every key, for each query head: one product of keys with a matrix that stays put.

The matrix is float32 and keys are mostly half as wide; it is cut into two parts of their width, so that the products
run at full speed and little more than float32's own rounding is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.tiles import PRECISION, padded, programs


@triton.jit
def _forms(
    k_ptr, mean_ptr, coarse_ptr, fine_ptr, size_ptr, out_ptr, entries, run, k_b, k_h, k_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SPREAD: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, head, heads = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    b, h = (head // (HEADS * GROUP)).to(tl.int64), (head % (HEADS * GROUP) // GROUP).to(tl.int64)
    n, d, j = tl.arange(0, N), tl.arange(0, DP), tl.program_id(1) * P + tl.arange(0, P)
    in_d, in_j = d < D, j < D
    mean = tl.load(mean_ptr + head * D + j, mask=in_j, other=0.0)
    if SPREAD:
        at = head.to(tl.int64) * (D * D) + d[:, None] * D + j[None, :]
        coarse = tl.load(coarse_ptr + at, mask=in_d[:, None] & in_j[None, :], other=0.0)
        if HALVES:
            fine = tl.load(fine_ptr + at, mask=in_d[:, None] & in_j[None, :], other=0.0)
        size = tl.load(size_ptr + head)
    keys = k_ptr + b * k_b + h * k_h
    out = out_ptr + (tl.program_id(1) * heads + head).to(tl.int64) * entries
    for start in tl.range(split * run, tl.minimum(split * run + run, entries), N, num_stages=STAGES):
        t = (start + n).to(tl.int64)
        there = t < entries
        k = tl.load(keys + t[:, None] * k_t + d[None, :], mask=there[:, None] & in_d[None, :], other=0.0)
        factor = tl.zeros([N, P], tl.float32) + mean[None, :]
        if SPREAD:
            product = tl.dot(k, coarse, input_precision=PRECISION)
            if HALVES:
                product = tl.dot(k, fine, product, input_precision=PRECISION)
            factor += product * size
        own = k
        if P < DP:
            own = tl.load(keys + t[:, None] * k_t + j[None, :], mask=there[:, None] & in_j[None, :], other=0.0)
        tl.store(out + t, tl.sum(factor * own.to(tl.float32), 1), mask=there)


def forms(k: Tensor, mean: Tensor, spread: Tensor | None) -> Tensor:
    """``mean . k + k . spread . k`` of every key, ``[B, H, G, T]`` float32.

    Args:
        k: ``[B, H, T, D]``; mean: ``[B, HG, D]`` float32; spread: ``[B, HG, D, D]`` float32, or None for zero.
    """
    (b, kv_heads, entries, dim), heads = k.shape, mean.shape[1]
    halves = k.element_size() == 2
    wide = min(padded(dim), (128 if padded(dim) <= 128 else 64) if halves else 32)
    across, step = -(-dim // wide), 64 if halves and padded(dim) <= 128 else 32 if halves else 16
    splits = max(1, min(-(-entries // (4 * step)), -(-2 * programs(k.device) // (b * heads * across))))
    run = -(-entries // (splits * step)) * step
    out = torch.empty(across, b, kv_heads, heads // kv_heads, entries, dtype=torch.float32, device=k.device)
    size = coarse = fine = mean = mean.contiguous()
    if spread is not None:
        coarse, size = spread.contiguous(), torch.ones_like(mean[..., 0])
        if halves:  # float16 has neither the range nor, near zero, the digits
            size = spread.abs().amax(dim=(-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
            scaled = spread / size[..., None, None]
            coarse = scaled.to(k.dtype).contiguous()
            fine = (scaled - coarse).to(k.dtype).contiguous()
    _forms[(-(-entries // run), across, b * heads)](
        k, mean, coarse, fine, size, out, entries, run, *k.stride()[:3],
        HEADS=kv_heads, GROUP=heads // kv_heads, D=dim, DP=padded(dim), P=wide, N=step, SPREAD=spread is not None,
        HALVES=halves, PRECISION=PRECISION, STAGES=2, num_warps=4,
    )  # fmt: skip
    return out[0] if across == 1 else out.sum(dim=0)
