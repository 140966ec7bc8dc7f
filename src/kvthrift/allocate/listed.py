"""Layer budgets that were found once, offline, and are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate.base import LayerAllocator
from kvthrift.allocate.share import Ints, share_out
from kvthrift.core import LayerView
from kvthrift.errors import ModelMismatchError
from kvthrift.part import require


def completed(entries: Sequence[float], mean: int, *, floor: int = 0, step: int = 1) -> Ints:
    """Listed budgets scaled to another mean, ``[L]`` whole numbers that add up to ``mean * L`` exactly (2509.08315).

    Every layer gets ``entries[l] * mean * L / sum(entries)``, fractions going to the largest remainders, ties to the
    lowest layer. Layers that would fall below the floor get the floor, and the others share what is left.

    Args:
        entries: ``[L]`` non-negative; all zero counts as equal.
        mean: entries per head on average over the layers, at least ``floor``.
        floor: the least of any layer, rounded up to a whole step.
        step: budgets are multiples of this, and so is ``mean``.
    """
    weights = np.asarray(entries, np.float64)
    least, total = -(-floor // step), mean // step * len(weights)
    out = np.full(len(weights), least, np.int64)
    free = np.ones(len(weights), np.bool_)
    while free.any():
        rest = total - least * int((~free).sum())
        found = share_out(rest, weights[free], np.full(int(free.sum()), rest, np.int64))
        places = np.flatnonzero(free)
        low = found < least
        if not low.any():
            out[places] = found
            break
        free[places[low]] = False
    return out * step


@dataclass(frozen=True)
class BudgetLayers(LayerAllocator, name="budgets"):
    """Entries per head of every layer, as a list found by a search (2509.08315).

    ``entries[l]`` is non-negative, ``l`` the model's own number of a layer; those of layers that are left whole are not
    read; an empty list makes all layers equal. Where the budget is the list's own mean (rounded up), layers get what is
    listed; at any other budget the list is scaled, see :func:`completed`. A text shorter than a layer's budget fills it
    only so far; what is left is not given to others. ``model`` is the fingerprint of the model it was found for.
    """

    entries: tuple[int, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        require(all(count >= 0 for count in self.entries), "listed layer budgets must be 0 or more entries.")

    def __str__(self) -> str:
        return f"{self.name}({len(self.entries)} layers)"

    def total(self, view: LayerView, per_head: Tensor, protected: int) -> Tensor:
        numbers = view.numbers or tuple(range(view.layers))
        if self.entries and numbers[-1] >= len(self.entries):
            raise ModelMismatchError(
                f"the list of layer budgets is for {len(self.entries)} layers, but this model has at least "
                f"{numbers[-1] + 1}. Tune for this model (kvthrift tune) and give that file."
            )
        listed = [self.entries[n] for n in numbers] if self.entries else [1] * len(numbers)
        own = -(-sum(listed) // len(listed)) if min(listed) >= protected else None
        found = {
            mean: listed[view.layer] if mean == own else int(completed(listed, mean, floor=protected)[view.layer])
            for mean in per_head.tolist()
        }
        return torch.tensor([found[mean] for mean in per_head.tolist()], device=per_head.device)
