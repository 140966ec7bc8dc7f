"""What queries look at, computed from keys without storing an attention matrix.

Views of the same softmax: the last few queries' rows or their sums, the column sums over all queries, the most (or the
mean) that each entry receives, and one step's rows over the entries of the store. Sums are Triton's
(``triton/norms.py``, ``triton/sums.py``) where there is a GPU for them; torch's, elsewhere, are their naive twins, and
take the memory of a block of queries times the entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.core import Products
from kvthrift.kernels import naive_scores
from kvthrift.kernels.fit import dense, fits, launching, load
from kvthrift.kernels.naive_scores import grouped_heads

_BLOCK = 256  # queries: bounds memory to this many rows of attention a head
_FEW = 64  # queries for which it is the keys that take the time


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
    grouped = grouped_heads(q, kv_heads)
    width = grouped.shape[2] * grouped.shape[3]
    logits = grouped.reshape(b, kv_heads, width, dim) @ k.transpose(-1, -2)
    logits = logits.float().view(*grouped.shape[:4], k.shape[2]) * scale
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    seen = valid[:, :, None, None, :] & (k_positions[:, :, None, None, :] <= q_positions[:, None, None, :, None])
    logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(0.0)


def window_sums(
    q: Tensor,
    k: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    valid: Tensor,
    scale: float,
    powers: tuple[int, ...] = (1,),
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Powers of the attention of a few queries, summed over the queries.

    Args:
        q, k, q_positions, k_positions, valid, scale, bias: as for :func:`window_attention`.
        powers: 1 for the attention itself, 2 for its square.

    Returns:
        ``[B, H, G, T]`` float32 for each power.
    """
    where = {"q_positions": q_positions, "k_positions": k_positions, "valid": valid, "scale": scale, "bias": bias}
    if not fits(q, k):
        return naive_scores.window_sums(window_attention(q, k, **where), powers)  # type: ignore[arg-type]
    with launching(q.device):
        given = [dense(x) for x in (q_positions, k_positions, valid)]
        q, k, bias = dense(q), dense(k), None if bias is None else dense(bias)
        lse = load("norms").norms(q, k, *given, scale, bias)
        return [load("sums").sums(q, k, lse, *given, scale, bias, power=p, together=True) for p in powers]


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
    products: Products = "exact",
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
        products: ``"int8"`` rounds queries and keys, each less its mean, to 8 bits, which tensor cores multiply at
            twice the rate; sums are then off by about as much as by rounding float32 vectors to bfloat16.

    Returns:
        ``[B, H, G, T]`` float32.
    """
    if fits(q, k) and products == "int8":
        with launching(q.device):
            given = [dense(x) for x in (q, k, lse.float(), q_positions, k_positions, valid)]
            rough: Tensor = load("sums_int8").sums_int8(*given, scale, bias, power=power, buffer=buffer)
            return rough
    if fits(q, k):
        with launching(q.device):
            given = [dense(x) for x in (q, k, lse.float(), q_positions, k_positions, valid)]
            weight = None if bias is None else dense(bias)
            few = q.shape[2] <= _FEW
            found: Tensor = load("sums").sums(*given, scale, weight, power=power, buffer=buffer, together=few)
            return found
    return naive_scores.power_sums(
        q, k, q_positions=q_positions, k_positions=k_positions, valid=valid, scale=scale, lse=lse, power=power,
        buffer=buffer, bias=bias, block=block, products=products,
    )  # fmt: skip


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
    grouped = grouped_heads(q, k.shape[1])[:, :, :, 0]  # [B, H, G, D]
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
        queries = grouped_heads(q[:, :, start : start + block], kv_heads).float() * scale
        width = queries.shape[3]
        norm = lse[:, :, start : start + block].reshape(b * kv_heads, group * width, 1).float()
        logs = torch.baddbmm(-norm, queries.reshape(b * kv_heads, group * width, dim), keys)
        logs = logs.view(b, kv_heads, group, width, entries)
        found = found + logs.exp_().sum(dim=3) if mean else torch.maximum(found, logs.amax(dim=3))
    found = found / max(q.shape[2], 1) if mean else found.exp()
    return found.clamp(max=1.0).flatten(1, 2)
