"""The naive twins of what scores, in torch: to be read beside the kernels, to test them, and where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.core import Products, Rope
from kvthrift.kernels.naive_int8 import rounded


def grouped_heads(q: Tensor, kv_heads: int) -> Tensor:
    """``[B, HG, W, D] -> [B, H, G, W, D]``."""
    b, heads, length, dim = q.shape
    return q.reshape(b, kv_heads, heads // kv_heads, length, dim)


def window_sums(rows: Tensor, powers: tuple[int, ...]) -> list[Tensor]:
    """Powers of attention rows ``[B, H, G, W, T]``, summed over the queries."""
    return [(rows if power == 1 else rows**power).sum(dim=3) for power in powers]


def power_sums(
    q: Tensor,
    k: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    valid: Tensor,
    scale: float,
    lse: Tensor,
    power: int,
    buffer: int,
    bias: Tensor | None,
    block: int,
    products: Products = "exact",
) -> Tensor:
    """See :func:`kvthrift.kernels.observe.power_sums`; each block of queries is one matrix product."""
    weight = None if bias is None else bias[:, :, None]  # [B, H, 1 or G, T]
    if products == "int8":
        q, k, offsets, shifts = rounded(q, k, q_positions, valid, scale, power)
        lse = lse - offsets
        shifts = shifts.view(shifts.shape[0], k.shape[1], -1, shifts.shape[-1])
        weight = shifts if weight is None else weight + shifts
    b, kv_heads, entries, dim = k.shape
    group = q.shape[1] // kv_heads
    total = torch.zeros(b, kv_heads, group, entries, dtype=torch.float32, device=k.device)
    keys = k.float().transpose(-1, -2).reshape(b * kv_heads, dim, entries)
    for start in range(0, q.shape[2], block):
        rows = q_positions[:, start : start + block]  # [B, W]
        width = rows.shape[1]
        queries = (grouped_heads(q[:, :, start : start + block], kv_heads).float() * scale).reshape(
            b * kv_heads, -1, dim
        )
        norm = lse[:, :, start : start + block].reshape(b * kv_heads, group * width, 1)
        before = ((k_positions <= rows.clamp(min=0).amin() - buffer) & valid).sum(dim=-1)
        reach = int(((k_positions <= rows.amax()) & valid).sum(dim=-1).amax())
        clear = min(int(before.amin()), reach)  # entries that every query of the block sees
        weights = torch.baddbmm(-norm, queries, keys[..., :reach]).view(b, kv_heads, group, width, reach)
        if weight is not None:
            weights += weight[:, :, :, None, :reach]
        weights.exp_()
        weights = weights.square_() if power == 2 else weights
        hidden = (k_positions[:, :, None, clear:reach] > rows[:, None, :, None] - buffer) | ~valid[
            :, :, None, clear:reach
        ]
        weights[..., clear:].masked_fill_(hidden[:, :, None], 0.0)
        if bool((rows < 0).any()):
            weights.masked_fill_((rows < 0)[:, None, None, :, None], 0.0)
        total[..., :reach] += weights.sum(dim=3)
    return total


def query_moments(q: Tensor, positions: Tensor, use: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """See :func:`kvthrift.kernels.expected.query_moments`."""
    plain = rope.rotate(q.float(), -positions[:, None]) / rope.attention_scaling
    plain = plain * use.float()[:, None, :, None]
    return plain.sum(dim=2), plain.transpose(-1, -2) @ plain


def gaussian_logits(k: Tensor, mean: Tensor, covariance: Tensor | None, scale: float) -> Tensor:
    """See :func:`kvthrift.kernels.expected.gaussian_logits`."""
    (b, h), dim, keys = k.shape[:2], k.shape[-1], k.float()
    logits = torch.einsum("bhgd,bhtd->bhgt", mean.view(b, h, -1, dim), keys) * scale
    if covariance is not None:
        spread = covariance.view(b, h, -1, dim, dim)
        logits = logits + torch.einsum("bhtd,bhgde,bhte->bhgt", keys, spread, keys) * scale**2 / 2
    return logits


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """See :func:`kvthrift.kernels.best.best`."""
    places = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return places < counts[..., None]
