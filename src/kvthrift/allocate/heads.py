"""Budgets that differ from head to head within a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate.base import HeadAllocator
from kvthrift.allocate.share import Ints, share_out
from kvthrift.core import LayerView
from kvthrift.errors import ModelMismatchError
from kvthrift.kernels import best
from kvthrift.part import require


def ranks(scores: Tensor) -> Tensor:
    """Place of each entry in descending order along the last dim; ties go to the lowest index."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@dataclass(frozen=True)
class AdaptiveHeads(HeadAllocator, name="adaptive"):
    """Heads compete for the layer's room with their scores (2407.11550).

    Every head first keeps the best ``safeguard`` share of the mean budget; the rest goes to the highest scores of the
    layer, whichever head they are in. ``blend`` is the paper's other form: that share of the competitive budget plus
    the rest of the uniform one.
    """

    safeguard: float = 0.2
    blend: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.safeguard <= 1, f"safeguard={self.safeguard} must lie between 0 and 1.")
        require(self.blend is None or 0 <= self.blend <= 1, f"blend={self.blend} must lie between 0 and 1.")

    @property
    def nested(self) -> bool:
        return self.blend is None

    @property
    def exact(self) -> bool:
        return self.blend is None

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        b, h, t = scores.shape
        floor = (per_head.double() * (0.0 if self.blend is not None else self.safeguard)).floor().long().clamp(min=1)
        total = torch.minimum(per_head * h, view.lengths.sum(dim=1))
        safe = best(scores, floor[:, None].expand(b, h))
        contest = scores.masked_fill(safe & view.valid, float("inf"))
        won = best(contest.transpose(1, 2).reshape(b, t * h), total)  # token-major, so that ties spread over heads
        counts = won.view(b, t, h).sum(dim=1)
        if self.blend is None:
            return counts
        wanted = self.blend * counts.double() + (1 - self.blend) * per_head[:, None].double()
        rows = [
            share_out(int(n), w, c) for n, w, c in zip(total.tolist(), wanted.cpu().numpy(), view.counted, strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(scores.device)


@dataclass(frozen=True)
class TableHeads(HeadAllocator, name="table"):
    """Budgets from an offline importance of every head of the model (2410.19258).

    With mean budget C (protected entries aside), ``floor(C / beta)`` entries per head go into a pool that is
    shared out by importance over the whole model, and the rest is every head's own. Smaller ``beta`` shares out
    more. Entries that rounding or a short text would lose go to other heads by weight, so that the mean is C.
    ``within="layer"`` shares each layer's room out over its own heads, which layers with budgets of their own need.

    ``importance[l][h]`` is non-negative, ``l`` the model's own number of a layer; rows of layers that are left
    whole are not read. ``model`` is the fingerprint of the model it was measured on.
    """

    importance: tuple[tuple[float, ...], ...] = ()
    beta: float = 1.2
    protected: int = 0
    model: str = ""
    within: Literal["model", "layer"] = "model"

    def __post_init__(self) -> None:
        require(self.beta >= 1, f"beta={self.beta} must be at least 1.")
        require(self.protected >= 0, f"protected={self.protected} must be 0 or more entries.")
        known = all(math.isfinite(x) and x >= 0 for row in self.importance for x in row)
        require(known, "head importance must be finite numbers, 0 or more.")
        even = len({len(row) for row in self.importance}) <= 1
        require(even, "head importance must have as many heads in every layer.")

    def __str__(self) -> str:
        heads = len(self.importance[0]) if self.importance else 0
        return f"{self.name}({len(self.importance)} x {heads} heads, beta={self.beta:g})"

    def capacities(self, per_head: int, length: int, numbers: tuple[int, ...]) -> Ints:
        """Entries ``[L, H]`` of the layers ``numbers`` whose mean is ``per_head``.

        Args:
            per_head: mean entries per head, protected ones included.
            length: tokens of the text: the most a head can hold.
            numbers: the model's own numbers of the compressed layers.
        """
        table = np.asarray([self.importance[number] for number in numbers], dtype=np.float64)
        pooled = int(max(per_head - self.protected, 0) / self.beta)
        floor = per_head - pooled
        caps = np.full(table.size, max(length - floor, 0), dtype=np.int64)
        return (share_out(pooled * table.size, table.reshape(-1), caps) + floor).reshape(table.shape)

    @property
    def modelwide(self) -> bool:
        return self.within == "model"

    def known(self, per_head: Ints, view: LayerView) -> Ints:
        numbers, mine = self._rows(view, view.lengths.shape[1]), view.layer
        if self.within == "layer":
            numbers, mine = numbers[mine : mine + 1], 0
        rows = [
            self.capacities(int(mean), length, numbers)[mine]
            for mean, length in zip(per_head, view.tokens, strict=True)
        ]
        return np.stack(rows).clip(min=1)

    def split(self, scores: Tensor, per_head: Tensor, view: LayerView) -> Tensor:
        counts = torch.from_numpy(self.known(per_head.cpu().numpy(), view)).to(scores.device)
        return torch.minimum(counts, view.lengths)

    def _rows(self, view: LayerView, heads: int) -> tuple[int, ...]:
        """The table's rows for the compressed layers."""
        layers = len(self.importance)
        found = len(self.importance[0]) if layers else 0
        known = view.numbers or tuple(range(view.layers))
        if found != heads or known[-1] >= layers:
            raise ModelMismatchError(
                f"the head importance table is for {layers} layers of {found} KV heads, but this model has at "
                f"least {known[-1] + 1} of {heads}. Calibrate for this model and give that file."
            )
        return known
