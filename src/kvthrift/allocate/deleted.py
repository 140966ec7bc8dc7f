"""Heads that are given up: they keep no more than their window, and another head's output stands for theirs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.allocate.groups import GroupHeads, group_counts
from kvthrift.allocate.share import Ints
from kvthrift.core import LayerView, Signals
from kvthrift.part import require


@dataclass(frozen=True)
class DeletedHeads(GroupHeads, name="deleted"):
    """Groups as :class:`GroupHeads` has them, of which the first is given up (2410.03090, its extreme form).

    Its heads keep the ``protected`` newest entries, by whose keys they are compared, and the others share what that
    leaves; from then on the output of the most similar head of the layer that is not given up takes the place of
    theirs, query head by query head. A layer of which no head would be left keeps all of them.
    """

    protected: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.sizes) >= 2, f"sizes={self.sizes} must name two groups at least: the first is given up.")
        require(self.protected >= 1, f"protected={self.protected} must be at least 1 entry, to compare heads by.")

    @property
    def needs(self) -> Signals:
        return Signals(stand_ins=True)

    def given_up(self, number: int, heads: int) -> list[bool]:
        """Which of the KV ``heads`` of the model's own layer ``number`` are."""
        gone = [label == 0 for label in self.group_of(number, heads)]
        return gone if not all(gone) else [False] * heads

    def known(self, per_head: Ints, view: LayerView) -> Ints:
        heads, number = view.lengths.shape[1], view.numbers[view.layer] if view.numbers else view.layer
        gone = np.asarray(self.given_up(number, heads))
        sizes = np.asarray(self.sizes)[self.group_of(number, heads)]
        counts = []
        for mean, there in zip(per_head, view.counted, strict=True):
            room, floor = int(mean) * heads, min(self.protected, int(mean))
            found = np.minimum(there, floor)
            found[~gone] = group_counts(room - int(found[gone].sum()), sizes[~gone], there[~gone], floor)
            counts.append(there if room >= there.sum() else found)
        return np.stack(counts)


def stand_ins(keys: Tensor, gone: Tensor) -> Tensor:
    """For every head the one whose output stands for its own, itself unless it is given up: ``[B, H]`` int64.

    The most similar of those that are left, by the mean cosine of keys of the same tokens; ties go to the lowest.

    Args:
        keys: ``[B, H, W, D]`` of the same W tokens in every head.
        gone: ``[B, H]`` bool, not all of a row.
    """
    unit = F.normalize(keys.float(), dim=-1)
    alike = torch.einsum("bhwd,bgwd->bhg", unit, unit)
    best = alike.masked_fill(gone[:, None], float("-inf")).argmax(dim=-1)
    own = torch.arange(keys.shape[1], device=keys.device).expand_as(best)
    return torch.where(gone, best, own)
