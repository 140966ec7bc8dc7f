"""What queries look at, computed from keys without storing an attention matrix.

Four views of the same softmax: the last few queries' rows, the column sums over all queries, the most (or the mean)
that each entry receives, and one step's rows over the entries of the store. Memory is bounded by a block of queries
times the entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # queries: bounds memory to this many rows of attention a head


def _group(q: Tensor, kv_heads: int) -> Tensor:
    """``[B, HG, W, D] -> [B, H, G, W, D]``."""
    b, heads, length, dim = q.shape
    return q.reshape(b, kv_heads, heads // kv_heads, length, dim)


def window_attention(
    q: Tensor,
    k: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    valid: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention rows of a few queries over all entries.

    Args:
        q: ``[B, HG, W, D]``; a row whose position is -1 is absent and gets zeros.
        k: ``[B, H, T, D]``.
        q_positions, k_positions: ``[B, W]`` and ``[B, H, T]`` int64; a query sees entries at or before its position.
        valid: ``[B, H, T]`` bool.
        scale: factor on the logits.
        bias: ``[B, H, T]`` added to every query's logits (the mass that folded entries stand for), or None.

    Returns:
        ``[B, H, G, W, T]`` float32, each row a softmax over the entries it sees.
    """
    b, kv_heads, _, dim = k.shape
    grouped = _group(q, kv_heads)
    width = grouped.shape[2] * grouped.shape[3]
    logits = grouped.reshape(b, kv_heads, width, dim) @ k.transpose(-1, -2)
    logits = logits.float().view(*grouped.shape[:4], k.shape[2]) * scale
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    seen = valid[:, :, None, None, :] & (k_positions[:, :, None, None, :] <= q_positions[:, None, None, :, None])
    logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(0.0)


def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    valid: Tensor,
    scale: float,
    lse: Tensor,
    bias: Tensor | None = None,
    block: int = _BLOCK,
) -> Tensor:
    """Attention that each entry receives from all given queries, summed over queries, mean over the group.

    Arguments as for :func:`power_sums`.

    Returns:
        ``[B, H, T]`` float32; without grouping, a row of T entries sums to the number of queries.
    """
    found = power_sums(
        q, k, q_positions=q_positions, k_positions=k_positions, valid=valid, scale=scale, lse=lse, bias=bias,
        block=block, power=1,
    )  # fmt: skip
    return found.mean(dim=2)


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
    buffer: int = 0,
    bias: Tensor | None = None,
    block: int = _BLOCK,
) -> Tensor:
    """A power of the attention that each entry receives from all given queries, summed over queries.

    The log-sum-exp that attention itself returned makes this one pass: each block of queries is one matrix product,
    exponentiated in place.

    Args:
        q, k, q_positions, k_positions, valid, scale, bias: as for :func:`window_attention`; entries in position order.
        lse: ``[B, HG, Q]`` log-sum-exp of every query over all entries it sees.
        power: 1 or 2.
        buffer: a query does not count for entries fewer positions before it than this.
        block: queries that are looked at together.

    Returns:
        ``[B, H, G, T]`` float32.
    """
    b, kv_heads, entries, dim = k.shape
    group = q.shape[1] // kv_heads
    total = torch.zeros(b, kv_heads, group, entries, dtype=torch.float32, device=k.device)
    keys = k.float().transpose(-1, -2).reshape(b * kv_heads, dim, entries)
    for start in range(0, q.shape[2], block):
        rows = q_positions[:, start : start + block]  # [B, W]
        width = rows.shape[1]
        queries = (_group(q[:, :, start : start + block], kv_heads).float() * scale).reshape(b * kv_heads, -1, dim)
        norm = lse[:, :, start : start + block].reshape(b * kv_heads, group * width, 1)
        before = ((k_positions <= rows.clamp(min=0).amin() - buffer) & valid).sum(dim=-1)
        reach = int(((k_positions <= rows.amax()) & valid).sum(dim=-1).amax())
        clear = min(int(before.amin()), reach)  # entries that every query of the block sees
        weights = torch.baddbmm(-norm, queries, keys[..., :reach]).view(b, kv_heads, group, width, reach)
        if bias is not None:
            weights += bias[:, :, None, None, :reach]
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


def entry_attention(
    q: Tensor, k: Tensor, *, valid: Tensor, scale: float, bias: Tensor | None = None, power: int = 1
) -> Tensor:
    """One step's attention over entries that all lie in its past, or a power of it, mean over the group.

    Args:
        q: ``[B, HG, 1, D]``.
        k: ``[B, H, T, D]``; ``valid [B, H, T]`` bool; ``bias`` as for :func:`window_attention`.

    Returns:
        ``[B, H, T]`` float32.
    """
    grouped = _group(q, k.shape[1])[:, :, :, 0]  # [B, H, G, D]
    logits = (grouped @ k.transpose(-1, -2)).float() * scale
    if bias is not None:
        logits = logits + bias[:, :, None]
    rows = logits.masked_fill(~valid[:, :, None], float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return (rows if power == 1 else rows**power).mean(dim=2)


def received_attention(
    q: Tensor, k: Tensor, *, scale: float, lse: Tensor, mean: bool = False, block: int = _BLOCK
) -> Tensor:
    """The most attention that each entry receives from any query, for each query head; or the mean over queries.

    Every query sees every entry given here; what else it sees counts by its log-sum-exp.

    Args:
        q: ``[B, HG, Q, D]``; k: ``[B, H, T, D]``.
        scale: factor on the logits.
        lse: ``[B, HG, Q]`` log-sum-exp of every query over all it sees, these entries included.
        mean: over queries, in place of the maximum.
        block: queries that are looked at together.

    Returns:
        ``[B, HG, T]`` float32, from 0 to 1.
    """
    b, kv_heads, entries, dim = k.shape
    group = q.shape[1] // kv_heads
    keys = k.float().transpose(-1, -2).reshape(b * kv_heads, dim, entries)
    found = torch.full((b, kv_heads, group, entries), 0.0 if mean else float("-inf"), device=k.device)
    for start in range(0, q.shape[2], block):
        queries = _group(q[:, :, start : start + block], kv_heads).float() * scale
        width = queries.shape[3]
        norm = lse[:, :, start : start + block].reshape(b * kv_heads, group * width, 1).float()
        logs = torch.baddbmm(-norm, queries.reshape(b * kv_heads, group * width, dim), keys)
        logs = logs.view(b, kv_heads, group, width, entries)
        found = found + logs.exp_().sum(dim=3) if mean else torch.maximum(found, logs.amax(dim=3))
    found = found / max(q.shape[2], 1) if mean else found.exp()
    return found.clamp(max=1.0).flatten(1, 2)
