"""What Gaussian queries would look at: sums over the queries there were, and the form that scores a key by them.

Triton's kernels (``triton/halves.py`` and, for other heads, ``triton/moments.py``; ``triton/forms.py``) where there is
a GPU for them; torch's, elsewhere, are their naive twins, and make float32 copies. Knows nothing of recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.core import Rope
from kvthrift.kernels import naive_scores
from kvthrift.kernels.fit import dense, fits, launching, load

Turns = tuple[Tensor, Tensor]


def query_turns(q: Tensor, positions: Tensor, rope: Rope) -> Turns | None:
    """What :func:`query_moments` needs to know of ``positions``, for all layers that a rotary embedding is one for.

    Returns:
        Cosines and sines ``[B, Q, R/2]`` in the precision that queries like ``q [B, HG, Q, D]`` ask for, or None where
        there is no use for them.
    """
    if not fits(q):
        return None
    angles = rope.angles(positions)
    dtype = torch.float16 if load("halves").takes(q, angles.shape[-1]) else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


def query_moments(
    q: Tensor, positions: Tensor, use: Tensor, rope: Rope, turns: Turns | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over queries of what they were before the rotary embedding, and of their outer products.

    Args:
        q: ``[B, HG, Q, D]`` post-RoPE.
        positions: ``[B, Q]`` integers.
        use: ``[B, Q]`` bool: the queries that count.
        rope: what turned them.
        turns: what :func:`query_turns` says of such queries; asked here if None.

    Returns:
        ``total [B, HG, D]`` and ``outer [B, HG, D, D]``, float32.
    """
    if not fits(q):
        return naive_scores.query_moments(q, positions, use, rope)
    cos, sin = turns or query_turns(q, positions, rope)  # type: ignore[misc]
    with launching(q.device):
        kernel = load("halves" if load("halves").takes(q, cos.shape[-1]) else "moments")
        total, outer = kernel.moments(dense(q), cos, sin, dense(use), 1 / rope.attention_scaling)
    return total, outer


def gaussian_logits(k: Tensor, mean: Tensor, covariance: Tensor | None, scale: float) -> Tensor:
    """Logarithm of the mean of ``exp(scale * q.k)`` over Gaussian queries: ``scale * mu.k + scale**2 / 2 * k.S.k``.

    Args:
        k: ``[B, H, T, D]``.
        mean: ``[B, HG, D]`` float32.
        covariance: ``[B, HG, D, D]`` float32, or None for zero.
        scale: factor on the logits.

    Returns:
        ``[B, H, G, T]`` float32.
    """
    if fits(k):
        spread = None if covariance is None else covariance * (scale**2 / 2)
        with launching(k.device):
            found: Tensor = load("forms").forms(dense(k), mean * scale, spread)
        return found
    return naive_scores.gaussian_logits(k, mean, covariance, scale)
