"""Joining parts of one attention by their log-sum-exps (2405.02480 and others call it the online softmax)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvthrift.core import AttentionOutput


def merge(parts: Sequence[AttentionOutput]) -> AttentionOutput:
    """Attention over the union of disjoint sets of entries, from attention over each.

    Args:
        parts: outputs ``[B, HG, Q, Dv]``, each with its ``lse [B, HG, Q]``; one part alone is returned as it is.

    Returns:
        The joined output, in the dtype of the first part, and its lse.
    """
    if len(parts) == 1:
        return parts[0]
    lses = []
    for part in parts:
        if part.lse is None:
            raise ValueError("merge needs the log-sum-exp of every part")
        lses.append(part.lse.float())
    stacked = torch.stack(lses)  # [N, B, HG, Q]
    lse = stacked.logsumexp(dim=0)
    weights = (stacked - lse.masked_fill(lse.isinf(), 0.0)).exp()
    out = weights[0][..., None] * parts[0].out.float()
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out + weight[..., None] * part.out.float()
    return AttentionOutput(out.to(parts[0].out.dtype), lse)
