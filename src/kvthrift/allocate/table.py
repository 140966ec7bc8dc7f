"""Layer budgets from an offline weight of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.allocate.share import Ints
from kvthrift.core import LayerView
from kvthrift.errors import ModelMismatchError
from kvthrift.part import require


def layer_budgets(weights: NDArray[np.float64], mean: int, *, least: int = 32, most: float = 3.0) -> Ints:
    """Whole budgets of all layers that add up to ``mean`` times their number (2508.02401).

    Every layer gets ``least`` (or the mean, if that is less) and its rounded share of the rest by weight, clipped to
    ``most`` times the mean. What rounding and clipping leave over or lack is mended one entry at a time: given in
    descending order of weight to layers below the cap, taken in ascending order from layers above the floor; ties go to
    the lowest layer.

    Args:
        weights: ``[L]`` non-negative; all zero counts as equal.
        mean: entries per head on average over the layers.
        least: entries of every layer.
        most: the cap, as a multiple of the mean.
    """
    count = len(weights)
    share = weights / weights.sum() if weights.sum() > 0 else np.full(count, 1 / count)
    floor, cap, total = min(least, mean), max(int(most * mean), mean), mean * count
    out = np.rint(share * (total - floor * count)).astype(np.int64) + floor
    out = np.asarray(np.clip(out, floor, cap), dtype=np.int64)
    gap = total - int(out.sum())
    order = np.argsort(-share if gap > 0 else share, kind="stable")
    step = 1 if gap > 0 else -1
    while gap:
        room = order[out[order] < cap] if gap > 0 else order[out[order] > floor]
        room = room[: abs(gap)]  # never empty: floor <= mean <= cap
        out[room] += step
        gap -= step * len(room)
    return out


@dataclass(frozen=True)
class TableLayers(LayerAllocator, name="table"):
    """Budgets from an offline weight of every layer, known before a prompt is seen (2508.02401).

    See :func:`layer_budgets`. A text shorter than a layer's budget fills it only so far; what is left is not given to
    others. Budgets below ``least`` are the same for every layer.

    ``weights[l]`` is non-negative, ``l`` the model's own number of a layer; those of layers that are left whole are not
    read; an empty table makes all layers equal. ``model`` is the fingerprint of the model it was measured on.
    """

    weights: tuple[float, ...] = ()
    least: int = 32
    most: float = 3.0
    model: str = ""

    def __post_init__(self) -> None:
        require(self.least >= 0, f"least={self.least} must be 0 or more entries.")
        require(self.most >= 1, f"most={self.most} must be at least 1 times the mean.")
        require(all(math.isfinite(w) and w >= 0 for w in self.weights), "layer weights must be finite, 0 or more.")

    def __str__(self) -> str:
        return f"{self.name}({len(self.weights)} layers, least={self.least}, most={self.most:g})"

    def total(self, view: LayerView, per_head: Tensor, protected: int) -> Tensor:
        numbers = view.numbers or tuple(range(view.layers))
        if self.weights and numbers[-1] >= len(self.weights):
            raise ModelMismatchError(
                f"the table of layer weights is for {len(self.weights)} layers, but this model has at least "
                f"{numbers[-1] + 1}. Calibrate for this model and give that file."
            )
        found = np.asarray([self.weights[n] for n in numbers] if self.weights else [1.0] * len(numbers), np.float64)
        least = max(self.least, protected)
        totals = {m: int(layer_budgets(found, m, least=least, most=self.most)[view.layer]) for m in per_head.tolist()}
        return torch.tensor([totals[m] for m in per_head.tolist()], device=per_head.device)
