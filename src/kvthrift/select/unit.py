"""Units: what is kept or dropped together."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.allocate.heads import ranks
from kvthrift.core import LayerView, Signals
from kvthrift.kernels import best
from kvthrift.part import Part, require


@dataclass(frozen=True)
class Unit(Part, kind="unit"):
    """A map from entries to groups that stay or go together."""

    @property
    def needs(self) -> Signals:
        """The signals this part reads."""
        return Signals()

    @property
    def shared(self) -> bool:
        """Whether all heads of a layer keep the same groups, which needs equal budgets."""
        return False

    @property
    def nested(self) -> bool:
        """Whether cutting by the same scores in several steps keeps what cutting at once to the last would keep."""
        return False

    @property
    def exact(self) -> bool:
        """Whether each head keeps exactly its count, whatever the scores."""
        return False

    @abstractmethod
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        """Which entries stay: ``[B, H, T]`` bool, at most ``counts`` a head; protected ones always.

        Args:
            scores: ``[B, H, T]`` float32; ties go to the lowest index.
            counts: ``[B, H]`` int64, protected entries included.
            protected: ``[B, H, T]`` bool.
            view: the layer.
        """


@dataclass(frozen=True)
class TokenUnit(Unit, name="token"):
    """Every entry by itself: each head keeps exactly its count."""

    @property
    def exact(self) -> bool:
        return True

    @property
    def nested(self) -> bool:
        return True

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        ranked = scores.masked_fill(protected, float("inf"))
        if view.full:
            return best(ranked, counts)
        return best(ranked.masked_fill(~view.valid, float("-inf")), counts) & view.valid


@dataclass(frozen=True)
class ChunkUnit(Unit, name="chunk"):
    """Runs of ``size`` consecutive entries (2502.00299).

    A chunk's score is the mean (or sum) of those of its unprotected entries; with ``per_head=False`` all heads of a
    layer keep the same chunks, by the sum over heads. A head keeps as many whole chunks as fit, so up to
    ``size - 1`` entries fewer than asked (more if the short last chunk is among them); with ``fill`` the best entries
    of the next chunks take up the rest. A budget smaller than a chunk falls back to single entries.
    """

    size: int = 10
    pooled: Literal["mean", "sum"] = "mean"
    per_head: bool = False
    fill: bool = False

    def __post_init__(self) -> None:
        require(self.size >= 1, f"chunk size={self.size} must be at least 1 entry.")

    @property
    def shared(self) -> bool:
        return not self.per_head

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        free = view.valid & ~protected
        summed, members = self._chunks(scores.masked_fill(~free, 0.0)), self._chunks(free.float())
        value = summed / members.clamp(min=1) if self.pooled == "mean" else summed
        value = value.masked_fill(members == 0, float("-inf"))  # [B, H, chunks]
        if self.shared:
            value = value.sum(dim=1, keepdim=True).expand_as(value)
        room = (counts - protected.sum(dim=-1)).clamp(min=0)
        place = ranks(value).repeat_interleave(self.size, dim=-1)[..., : scores.shape[-1]]
        whole = room // self.size
        keep = (place < whole[..., None]) & free | protected
        small = (whole == 0) & (room > 0)
        if not (self.fill or small.any()):
            return keep
        left = room - (keep & ~protected).sum(dim=-1)
        spare = free & ~keep
        ranked = ranks(scores.masked_fill(~free, float("-inf")))
        order = torch.where(small[..., None], 0, place) * scores.shape[-1] + ranked  # by chunk, then by score
        extra = spare & (ranks((-order).masked_fill(~spare, torch.iinfo(order.dtype).min)) < left[..., None])
        return keep | (extra if self.fill else extra & small[..., None])

    def _chunks(self, x: Tensor) -> Tensor:
        """Sum over runs of ``size`` along the entries: ``[B, H, T] -> [B, H, ceil(T / size)]``."""
        exact = x.double()  # so that equal scores tie with those of a short last chunk, too
        padded = F.pad(exact, (0, -x.shape[-1] % self.size))
        return padded.reshape(*x.shape[:-1], -1, self.size).sum(dim=-1)
