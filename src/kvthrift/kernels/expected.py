"""What Gaussian queries would look at: sums over the queries there were, and the form that scores a key by them.

Triton's kernels (``triton/moments.py``, ``triton/forms.py``) where there is a GPU for them; torch's, elsewhere, are
their naive twins, and make float32 copies of queries and keys. Knows nothing of recipes.
"""

from __future__ import annotations

from torch import Tensor

from kvthrift.core import Rope
from kvthrift.kernels import naive_scores
from kvthrift.kernels.fit import dense, fits, launching, load


def query_moments(q: Tensor, positions: Tensor, use: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Sums over queries of what they were before the rotary embedding, and of their outer products.

    Args:
        q: ``[B, HG, Q, D]`` post-RoPE.
        positions: ``[B, Q]`` integers.
        use: ``[B, Q]`` bool: the queries that count.
        rope: what turned them.

    Returns:
        ``total [B, HG, D]`` and ``outer [B, HG, D, D]``, float32.
    """
    if not fits(q):
        return naive_scores.query_moments(q, positions, use, rope)
    angles = rope.angles(positions)
    with launching(q.device):
        given = (dense(q), angles.cos(), angles.sin(), dense(use))
        total, outer = load("moments").moments(*given, 1 / rope.attention_scaling)
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
