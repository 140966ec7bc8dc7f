"""The naive twins: attention written out in float32, for reading beside the fast paths and for testing them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.core import AttentionOutput


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
