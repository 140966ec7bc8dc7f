"""The naive twins: attention written out in float32, for reading beside the fast paths and for testing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift.core import AttentionOutput
from kvthrift.kernels.codes import read_keys, read_values, write_keys, write_values

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> AttentionOutput:
    """Softmax attention with grouped heads, every step spelt out.

    Args:
        q: ``[B, HG, Q, D]``.
        k, v: ``[B, H, T, D]``, ``[B, H, T, Dv]``.
        scale: factor on the logits.
        causal: query ``i`` sees entries ``0..i`` (needs Q = T).
        bias: ``[B, H, T]`` added to the logits of every query, ``-inf`` where an entry is absent.

    Returns:
        ``out [B, HG, Q, Dv]`` in the dtype of ``q`` and ``lse [B, HG, Q]`` in float32. A query that sees no entry
        gets output 0 and lse ``-inf``.
    """
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)  # [B, HG, T, D]
    values = v.float().repeat_interleave(group, dim=1)
    logits = q.float() @ keys.transpose(-1, -2) * scale  # [B, HG, Q, T]
    if bias is not None:
        logits = logits + bias.float().repeat_interleave(group, dim=1)[:, :, None]
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(dim=-1)  # [B, HG, Q]
    probabilities = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return AttentionOutput((probabilities @ values).to(q.dtype), lse)


def paged_attend(q: Tensor, paged: Paged, *, scale: float) -> AttentionOutput:
    """Attention over pages, after gathering them; see :func:`kvthrift.kernels.paged.paged_attend`."""
    b, (rows, width) = q.shape[0], paged.table.shape
    places = width * paged.page
    index = paged.table.long().clamp(min=0)
    keys, values = (t.reshape(b, rows // b, places, t.shape[-1]) for t in _pages(paged, index))
    absent = torch.arange(places, device=q.device) >= paged.lengths[:, None]  # [rows, places]
    bias = torch.zeros(absent.shape, device=q.device) if paged.bias is None else paged.bias[index].reshape(rows, places)
    return attend(q, keys, values, scale=scale, bias=bias.masked_fill(absent, float("-inf")).view(b, -1, places))


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
