"""Head budgets by group: every head of a layer belongs to one, and groups differ in size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.allocate.base import HeadAllocator
from kvthrift.allocate.share import Ints, share_out
from kvthrift.core import LayerView
from kvthrift.errors import ModelMismatchError
from kvthrift.part import require


def group_counts(total: int, sizes: NDArray[np.float64], caps: Ints, floor: int) -> Ints:
    """Whole entries of each head, in proportion to ``sizes``, none below ``floor`` nor above its cap.

    They add up to ``total``, or to the sum of the caps where that is less. Heads whose share would be below the floor
    get the floor, and the others share what is left.

    Args:
        total: entries of the layer; at least ``floor`` a head.
        sizes: ``[H]`` positive.
        caps: ``[H]`` the most each head can hold.
        floor: the least a head is given.
    """
    least = np.minimum(caps, floor)
    low = np.zeros(len(sizes), dtype=bool)
    while True:
        left = total - int(least[low].sum())
        shares = share_out(max(left, 0), np.where(low, 0.0, sizes), np.where(low, 0, caps))
        short = ~low & (shares < least)
        if not short.any():
            return np.where(low, least, shares)
        low |= short


@dataclass(frozen=True)
class GroupHeads(HeadAllocator, name="groups"):
    """Budgets in fixed proportions, by the group that each head was sorted into offline (2410.03090).

    A head of group g gets entries in proportion to ``sizes[g]``, scaled so that the layer's mean is the budget exactly:
    sizes 256 and 512 of equal groups, at a mean of 384, are just those. No head gets less than ``protected``, nor more
    than there are; what that leaves or takes, the others share. With ``halved``, for two groups, a text no longer than
    the larger size stays whole in its heads, and by half in the others (the authors' code), where the budget has room
    for that; it is less than the budget then.

    ``labels[l][h]`` is the group of KV head h in the model's own layer l; an empty table deals groups out by the head's
    number. ``model`` is the fingerprint of the model they were measured on.
    """

    labels: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[float, ...] = (256.0, 512.0)
    protected: int = 0
    model: str = ""
    halved: bool = False

    def __post_init__(self) -> None:
        require(len(self.sizes) >= 1, "sizes must name at least one group.")
        require(
            not self.halved or len(self.sizes) == 2,
            f"halved=True is a rule for two groups, but sizes={self.sizes} names {len(self.sizes)}.",
        )
        require(all(0 < s < float("inf") for s in self.sizes), f"sizes={self.sizes} must be positive numbers.")
        require(self.protected >= 0, f"protected={self.protected} must be 0 or more entries.")
        known = all(0 <= label < len(self.sizes) for row in self.labels for label in row)
        require(known, f"group labels must lie between 0 and {len(self.sizes) - 1}, one for each of sizes.")

    def __str__(self) -> str:
        sizes = "/".join(f"{size:g}" for size in self.sizes)
        return f"{self.name}({len(self.labels)} layers, sizes={sizes})"

    def known(self, per_head: Ints, view: LayerView) -> Ints:
        heads = view.lengths.shape[1]
        sizes = np.asarray(self.sizes, dtype=np.float64)[self._labels(view, heads)]
        floor, rows = max(self.protected, 1), zip(per_head, view.counted, view.tokens, strict=True)
        return np.stack([self._counts(int(mean), sizes, caps, floor, tokens) for mean, caps, tokens in rows])

    def _counts(self, mean: int, sizes: NDArray[np.float64], caps: Ints, floor: int, tokens: int) -> Ints:
        """Entries of each head of one sequence of so many tokens."""
        room = mean * len(sizes)
        large = sizes == max(self.sizes)
        if self.halved and large.any() and tokens <= max(self.sizes) * room / sizes.sum():
            found = np.minimum(caps, np.where(large, tokens, max(tokens // 2, floor)))
            if found.sum() <= room:  # else the sizes differ by more than two to one
                return found
        return group_counts(room, sizes, caps, floor)

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        return torch.from_numpy(self.known(per_head.cpu().numpy(), view)).to(scores.device)

    def _labels(self, view: LayerView, heads: int) -> list[int]:
        return self.group_of(view.numbers[view.layer] if view.numbers else view.layer, heads)

    def group_of(self, number: int, heads: int) -> list[int]:
        """The group of each of the KV ``heads`` of the model's own layer ``number``.

        Raises:
            ModelMismatchError: the table has no such layer, or another count of heads.
        """
        if not self.labels:
            return [head % len(self.sizes) for head in range(heads)]
        if number >= len(self.labels) or len(self.labels[number]) != heads:
            raise ModelMismatchError(
                f"the table of head groups is for {len(self.labels)} layers of {len(self.labels[0])} KV heads, but "
                f"this model has at least {number + 1} of {heads}. Calibrate for this model and give that file."
            )
        return list(self.labels[number])
