"""The largest numbers of every row, as a mask: what a budget keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.kernels import naive_scores
from kvthrift.kernels.fit import launching, load, served

_LONG = 8192  # numbers of a row, for which it takes several programs


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """Which numbers are among the ``counts`` largest of their row; ties go to the lowest index.

    On a GPU nothing is sorted and the host is not waited for.

    Args:
        scores: ``[..., T]`` float32; NaN is above all.
        counts: ``[...]`` integers, or what broadcasts to it; one above T takes the whole row.

    Returns:
        ``[..., T]`` bool.
    """
    if scores.dtype == torch.float32 and served(scores):
        with launching(scores.device):
            found: Tensor = load("best_long" if scores.shape[-1] >= _LONG else "best").best(scores, counts)
        return found
    return naive_scores.best(scores, counts)
