"""A second look at the ranking, once every head knows its count."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.kernels import best
from kvthrift.part import Part, require

_BLOCK = 4096  # tokens projected at a time
_BLOCK_CPU = 1024  # there, what a core's cache holds


@dataclass(frozen=True)
class Refiner(Part, kind="refine"):
    """Scores again, knowing the counts."""

    @property
    def needs(self) -> Signals:
        """The signals this part reads."""
        return Signals()

    @abstractmethod
    def refine(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        """New scores ``[B, H, T]``; arguments as for :meth:`kvthrift.select.Unit.select`."""


@dataclass(frozen=True)
class OutputAware(Refiner, name="output_aware"):
    """Half the room by score, the rest by what an entry adds to the layer's output (2502.03805).

    The best ``first`` share of each head's count by the base score stays. The others are ranked by
    ``(score + epsilon) * ||W_o v||_1``, W_o the head's slice of the output projection, mean over the group.
    """

    first: float = 0.5
    epsilon: float = 1e-4
    value_norm: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.first <= 1, f"first={self.first} must lie between 0 and 1.")
        require(self.epsilon >= 0, f"epsilon={self.epsilon} must be 0 or more.")

    @property
    def needs(self) -> Signals:
        return Signals(output_weight=self.value_norm)

    def refine(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        ranked = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
        stay = best(ranked, (counts.double() * self.first).floor().long())
        second = scores + self.epsilon
        if self.value_norm:
            second = second * self._contribution(view)
        return second.masked_fill(stay, float("inf"))

    @staticmethod
    def _contribution(view: LayerView) -> Tensor:
        if view.output_weight is None:
            raise ValueError("the runtime did not gather the output projection that was declared")
        _, h, t, dim = view.values.shape
        weight = view.output_weight.float().view(h, view.group, dim, -1)
        parts = []
        block = _BLOCK_CPU if view.values.device.type == "cpu" else _BLOCK
        for start in range(0, t, block):
            values = view.values[:, :, start : start + block].float()
            norms = [
                (values @ weight[:, g]).abs_().sum(dim=-1)  # [B, H, block]
                for g in range(view.group)
            ]
            parts.append(torch.stack(norms).mean(dim=0))
        return torch.cat(parts, dim=-1)
