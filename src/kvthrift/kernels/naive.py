"""The naive twins: attention written out in float32, for reading beside the fast paths and for testing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.core import AttentionOutput
from kvthrift.kernels.codes import read_keys, read_values, write_keys, write_values

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged
    from kvthrift.kernels.pages import PageBounds


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    cap: float | None = None,
) -> AttentionOutput:
    """Softmax attention with grouped heads, every step spelt out.

    Args:
        q: ``[B, HG, Q, D]``.
        k, v: ``[B, H, T, D]``, ``[B, H, T, Dv]``.
        scale: factor on the logits.
        causal: query ``i`` sees entries ``0..i`` (needs Q = T).
        bias: ``[B, H, T]`` added to the logits of every query, ``-inf`` where an entry is absent.
        hidden: ``[B, H, Q, T]`` bool, what a query does not see.
        cap: logits become ``cap * tanh(logits / cap)`` before the bias.

    Returns:
        ``out [B, HG, Q, Dv]`` in the dtype of ``q`` and ``lse [B, HG, Q]`` in float32. A query that sees no entry
        gets output 0 and lse ``-inf``.
    """
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)  # [B, HG, T, D]
    values = v.float().repeat_interleave(group, dim=1)
    logits = q.float() @ keys.transpose(-1, -2) * scale  # [B, HG, Q, T]
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    if bias is not None:
        logits = logits + bias.float().repeat_interleave(group, dim=1)[:, :, None]
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    if hidden is not None:
        logits = logits.masked_fill(hidden.repeat_interleave(group, dim=1), float("-inf"))
    lse = logits.logsumexp(dim=-1)  # [B, HG, Q]
    probabilities = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return AttentionOutput((probabilities @ values).to(q.dtype), lse)


def paged_attend(
    q: Tensor,
    paged: Paged,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    positions: Tensor | None = None,
    cap: float | None = None,
) -> AttentionOutput:
    """Attention over pages, after gathering them; see :func:`kvthrift.kernels.paged.paged_attend`."""
    b, (rows, width) = q.shape[0], paged.table.shape
    places = width * paged.page
    index = paged.table.long().clamp(min=0)
    keys, values = (t.reshape(b, rows // b, places, t.shape[-1]) for t in _pages(paged, index))
    absent = torch.arange(places, device=q.device) >= paged.lengths[:, None]  # [rows, places]
    bias = torch.zeros(absent.shape, device=q.device) if paged.bias is None else paged.bias[index].reshape(rows, places)
    bias, hidden = bias.masked_fill(absent, float("-inf")).view(b, -1, places), None
    if causal:
        hidden = _own(paged.lengths.view(b, -1), q.shape[2], places)
    if window is not None and positions is not None:
        held = paged.positions[index].view(b, rows // b, 1, places)
        gone = held <= positions.to(held.dtype)[:, None, :, None] - window
        hidden = gone if hidden is None else hidden | gone
    return attend(q, keys, values, scale=scale, bias=bias, hidden=hidden, cap=cap)


def _own(lengths: Tensor, steps: int, places: int) -> Tensor:
    """``[B, H, Q, places]`` bool: what comes after each query, of rows whose last entries are the queries' own."""
    step = torch.arange(steps, device=lengths.device)
    ends = lengths[:, :, None] - steps + step + 1  # [B, H, Q]
    return torch.arange(places, device=lengths.device) >= ends[..., None]


def _pages(paged: Paged, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every row's pages, ``[rows, width, page, D]``."""
    coded = paged.coded
    if coded is None:
        return paged.keys[index], paged.values[index]
    rows = torch.arange(len(index), device=index.device)
    last = (paged.lengths.long() - 1).clamp(min=0) // paged.page
    keys, values = (
        found.view(*index.shape, *found.shape[1:])
        for found in (read(coded, index.flatten(), torch.float32) for read in (read_keys, read_values))
    )
    if index.shape[1]:
        keys[rows, last], values[rows, last] = paged.keys.float(), paged.values.float()
    return keys, values


def page_scores(q: Tensor, paged: Paged, bounds: PageBounds, *, per: str, over: str) -> Tensor:
    """What the keys of each page can come to; see :func:`kvthrift.kernels.pages.page_scores`."""
    rows, width = paged.table.shape
    queries = q.reshape(rows, -1, q.shape[-1]).float()  # [rows, GQ, Dk]
    low, high = (bound[paged.table.long().clamp(min=0)].float().transpose(1, 2) for bound in bounds)
    scores = queries.clamp(min=0) @ high + queries.clamp(max=0) @ low  # [rows, GQ, width]
    scores = scores.view(rows if per == "group" else rows * queries.shape[1] // q.shape[2], -1, width)
    scores = scores.amax(1) if over == "max" else scores.sum(1)
    lengths = paged.lengths.repeat_interleave(len(scores) // rows)
    behind = torch.arange(width, device=q.device) * paged.page >= lengths[:, None]
    return scores.masked_fill(behind, float("-inf"))


def paged_append(k: Tensor, v: Tensor, positions: Tensor, paged: Paged) -> None:
    """One entry behind each row's; see :func:`kvthrift.kernels.paged.paged_append`."""
    rows, page = paged.table.shape[0], paged.page
    lengths = paged.lengths.long()
    slots = paged.table.long().gather(1, (lengths // page)[:, None])[:, 0] * page + lengths % page
    inside = slots
    if paged.coded is not None:
        full = ((lengths > 0) & (lengths % page == 0)).nonzero()[:, 0]
        written = paged.table.long()[full, lengths[full] // page - 1]
        write_keys(paged.coded, written, paged.keys[full])
        write_values(paged.coded, written, paged.values[full])
        inside = torch.arange(rows, device=slots.device) * page + lengths % page
    paged.keys.flatten(0, 1)[inside] = k.reshape(rows, -1)
    paged.values.flatten(0, 1)[inside] = v.reshape(rows, -1)
    paged.positions.view(-1)[slots] = positions.to(torch.int32).repeat_interleave(rows // len(positions))
    paged.lengths.add_(1)
