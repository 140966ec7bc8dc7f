"""The allocators' contracts, and equal shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvthrift.allocate.share import Ints
from kvthrift.core import LayerView, Signals
from kvthrift.part import Part


@dataclass(frozen=True)
class LayerAllocator(Part, kind="layers"):
    """Entries per head of each layer.

    ``scope="layer"`` answers as soon as a layer is prefilled (:meth:`total`). ``scope="model"`` weighs layers against
    each other (:meth:`weight`): the runtime cuts finished layers further as later ones are weighed, so that the whole
    holds little more than the budget. ``scope="joint"`` sees the scores of all layers before any is cut
    (:meth:`share`), which takes the memory of the whole uncompressed cache. ``gives_heads`` says that it then gives
    each head its own budget. One that ``decides`` finds how much is enough (:meth:`stop`); a budget is an upper limit
    then, and none is needed.
    """

    scope: ClassVar[Literal["layer", "model", "joint"]] = "layer"
    gives_heads: ClassVar[bool] = False
    decides: ClassVar[bool] = False

    @property
    def needs(self) -> Signals:
        """The signals this part reads."""
        return Signals()

    def total(self, view: LayerView, per_head: Tensor, protected: int) -> Tensor:
        """Entries per head of this layer ``[B]`` int64.

        Args:
            view: the layer.
            per_head: ``[B]`` int64 on the CPU, the mean over all layers, protected entries included.
            protected: entries per head that are always kept.
        """
        return per_head

    def weight(self, view: LayerView, scores: Tensor) -> Tensor:
        """How much this layer wants, ``[B]`` float32, positive; only for ``scope="model"``."""
        raise NotImplementedError

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        """Entries of every layer, int64: ``[B]`` per head, or ``[B, H]`` of each head; only for ``scope="joint"``.

        Args:
            contests: ``[B, H, T]`` for each layer: scores, ``+inf`` for protected entries, ``-inf`` where is none.
            per_head: ``[B]`` int64, the mean over all layers, protected entries included.
        """
        raise NotImplementedError

    def agree(self, scores: Sequence[Tensor], positions: Sequence[Tensor], valid: Sequence[Tensor]) -> list[Tensor]:
        """The scores that each layer chooses by, its own by default; only for ``scope="joint"``.

        Args:
            scores: ``[B, H, T]`` for each layer.
            positions: ``[B, H, T]`` int64 of its entries.
            valid: ``[B, H, T]`` bool, those that there are.
        """
        return list(scores)

    def stop(self, view: LayerView, scores: Tensor, protected: Tensor) -> Tensor:
        """Entries per head that are enough for this layer, ``[B]`` int64; only for one that ``decides``.

        Args:
            view: the layer.
            scores: ``[B, H, T]``; the lowest go first.
            protected: ``[B, H, T]`` bool, those that never go.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class HeadAllocator(Part, kind="heads"):
    """Entries of each head of one layer."""

    @property
    def needs(self) -> Signals:
        """The signals this part reads."""
        return Signals()

    @property
    def uniform(self) -> bool:
        """Whether every head of a layer gets as many entries."""
        return False

    @property
    def nested(self) -> bool:
        """Whether cutting by the same scores in several steps keeps what cutting at once to the last would keep."""
        return False

    @property
    def modelwide(self) -> bool:
        """Whether heads of all layers share the room, so that layers must have equal budgets."""
        return False

    @property
    def exact(self) -> bool:
        """Whether the heads' entries add up to ``per_head * H``, or to all there are where that is less, in any case.

        That must hold wherever ``per_head`` is no less than what is protected.
        """
        return False

    def known(self, per_head: Ints, view: LayerView) -> Ints | None:
        """What :meth:`split` will say, where that takes no look at scores, on the host: ``[B, H]``; else None.

        It may be more than a head's entries.
        """
        return None

    @abstractmethod
    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        """Entries of each head ``[B, H]`` int64, at most ``view.lengths``, at least 1.

        Args:
            scores: ``[B, H, T]``: ``+inf`` for protected entries, ``-inf`` where there is none.
            per_head: ``[B]`` int64, the layer's mean.
            view: the layer; only sizes, positions and the signals that are declared may be read.
        """


@dataclass(frozen=True)
class UniformLayers(LayerAllocator, name="uniform"):
    """The same for every layer."""


@dataclass(frozen=True)
class UniformHeads(HeadAllocator, name="uniform"):
    """The same for every head."""

    @property
    def uniform(self) -> bool:
        return True

    @property
    def nested(self) -> bool:
        return True

    def known(self, per_head: Ints, view: LayerView) -> Ints | None:
        return per_head.clip(min=1)[:, None].repeat(view.lengths.shape[1], axis=1)

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        return torch.minimum(per_head[:, None].clamp(min=1), view.lengths)
