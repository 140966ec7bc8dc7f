"""Sharing a whole number out by weight, exactly, under a cap for each share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def share_out(total: int, weights: NDArray[np.float64], caps: Ints) -> Ints:
    """Whole shares of ``total`` in proportion to ``weights``, none above its cap.

    What a capped share leaves goes to the others by weight; fractions go to the largest remainders, ties to the
    lowest index. The shares add up to ``total`` exactly, or to the sum of the caps where that is less.

    Args:
        total: whole number to share.
        weights: ``[N]`` non-negative; all zero (or not finite) counts as equal.
        caps: ``[N]`` the most each share may be.
    """
    total = int(min(total, caps.sum()))
    usable = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    if usable.sum() <= 0:
        usable = np.ones_like(usable)
    shares = np.zeros(len(caps), dtype=np.float64)
    open_ = caps > 0
    left = float(total)
    while left > 1e-9 and open_.any():
        pull = usable * open_
        if pull.sum() <= 0:
            pull = open_.astype(np.float64)
        offer = shares + left * pull / pull.sum()
        full = open_ & (offer >= caps)
        if not full.any():
            shares = offer
            break
        shares[full] = caps[full]
        open_ &= ~full
        left = total - shares.sum() if not open_.any() else total - shares[~open_].sum()
        shares[open_] = 0.0
    whole = np.minimum(np.floor(shares + 1e-9).astype(np.int64), caps)
    order = np.argsort(-(shares - whole), kind="stable")
    for index in np.concatenate((order, order)):
        if whole.sum() >= total:
            break
        if whole[index] < caps[index]:
            whole[index] += 1
    return whole
