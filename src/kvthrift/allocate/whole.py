"""Whole heads or next to nothing: the heads that matter most keep everything, the others what is protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate.base import HeadAllocator
from kvthrift.allocate.share import Ints
from kvthrift.core import LayerView
from kvthrift.errors import ModelMismatchError
from kvthrift.part import require


@dataclass(frozen=True)
class WholeHeads(HeadAllocator, name="whole"):
    """Whole heads of the model stay, in descending order of an offline importance (2505.23416).

    The others keep ``protected`` entries, one at least. What is left, less than a head, goes to the next in order; so
    the total is exact. Ties go to the lowest layer, then to the lowest head. ``within="layer"`` ranks the heads of each
    layer for themselves, which layers with budgets of their own need.

    ``importance[l][h]`` is finite, ``l`` the model's own number of a layer; rows of layers that are left whole are not
    read; an empty table takes heads by number. ``model`` is the fingerprint of the model it was measured on.
    """

    importance: tuple[tuple[float, ...], ...] = ()
    protected: int = 0
    model: str = ""
    within: Literal["model", "layer"] = "model"

    def __post_init__(self) -> None:
        require(self.protected >= 0, f"protected={self.protected} must be 0 or more entries.")
        known = all(math.isfinite(x) for row in self.importance for x in row)
        require(known, "head importance must be finite numbers.")

    def __str__(self) -> str:
        heads = len(self.importance[0]) if self.importance else 0
        return f"{self.name}({len(self.importance)} x {heads} heads)"

    def capacities(self, per_head: int, length: int, table: np.typing.NDArray[np.float64]) -> Ints:
        """Entries ``[L, H]`` of heads of that importance ``[L, H]``, in a text of ``length`` tokens.

        Args:
            per_head: mean entries per head, protected ones included.
            length: the most a head can hold.
            table: one row for each compressed layer.
        """
        least = min(max(self.protected, 1), length)
        room = max(min(per_head, length) - least, 0) * table.size
        each = max(length - least, 1)
        order = np.argsort(-table.reshape(-1), kind="stable")
        more = np.zeros(table.size, dtype=np.int64)
        more[order] = np.clip(room - each * np.arange(table.size), 0, length - least)
        return (more + least).reshape(table.shape)

    @property
    def modelwide(self) -> bool:
        return self.within == "model"

    def known(self, per_head: Ints, view: LayerView) -> Ints:
        table, mine = self._table(view, view.lengths.shape[1]), view.layer
        if self.within == "layer":
            table, mine = table[mine : mine + 1], 0
        rows = [
            self.capacities(int(mean), length, table)[mine] for mean, length in zip(per_head, view.tokens, strict=True)
        ]
        return np.stack(rows)

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        counts = torch.from_numpy(self.known(per_head.cpu().numpy(), view)).to(scores.device)
        return torch.minimum(counts, view.lengths)

    def _table(self, view: LayerView, heads: int) -> np.typing.NDArray[np.float64]:
        """The rows of the compressed layers."""
        numbers = view.numbers or tuple(range(view.layers))
        if not self.importance:
            return np.zeros((len(numbers), heads))
        found = len(self.importance[0])
        if found != heads or numbers[-1] >= len(self.importance):
            raise ModelMismatchError(
                f"the head importance table is for {len(self.importance)} layers of {found} KV heads, but this model "
                f"has at least {numbers[-1] + 1} of {heads}. Calibrate for this model and give that file."
            )
        return np.asarray([self.importance[number] for number in numbers], dtype=np.float64)
