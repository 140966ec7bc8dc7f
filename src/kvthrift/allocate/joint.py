"""Budgets over all layers (and heads) at once, from the scores of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.allocate.base import LayerAllocator
from kvthrift.errors import RecipeError
from kvthrift.part import require

_ABSENT = float("-inf")


def stack(contests: Sequence[Tensor]) -> Tensor:
    """Layers side by side, ``[B, L * H, T]``, the shorter ones filled up with ``-inf``."""
    longest = max(x.shape[-1] for x in contests)
    return torch.cat([F.pad(x, (0, longest - x.shape[-1]), value=_ABSENT) for x in contests], dim=1)


def unstack(counts: Tensor, contests: Sequence[Tensor]) -> list[Tensor]:
    """``[B, L * H]`` back into one ``[B, H]`` a layer."""
    return list(torch.split(counts, [x.shape[1] for x in contests], dim=1))


def winners(table: Tensor, room: Tensor) -> Tensor:
    """How many of each row's numbers are among the ``room [B]`` largest of ``table [B, N, T]``: ``[B, N]`` int64.

    Ties go to the lowest place first, then to the lowest row, so that they spread over rows.
    """
    b, rows, places = table.shape
    order = table.transpose(1, 2).reshape(b, -1).argsort(dim=1, descending=True, stable=True)
    won = torch.arange(rows * places, device=table.device) < room[:, None]
    return torch.zeros(b, rows, dtype=torch.int64, device=table.device).scatter_add_(1, order % rows, won.long())


@dataclass(frozen=True)
class PoolLayers(LayerAllocator, name="pool"):
    """The highest scores of the whole model stay, whichever layer and head they are in (2505.23416).

    Every head keeps its best entry. The total is exact; with ``strict`` it is the published rule instead: of N scores
    sorted descending, those strictly above number ``max(K - 1, 0)`` (from 0) stay, K the room, so one fewer than asked,
    and fewer still where scores tie.
    """

    strict: bool = False
    scope: ClassVar[Literal["layer", "model", "joint"]] = "joint"
    gives_heads: ClassVar[bool] = True

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        table = stack(contests)
        value, best = table.max(dim=-1, keepdim=True)
        table = table.scatter(-1, best, value.where(value == _ABSENT, torch.inf))
        there = (table > _ABSENT).sum(dim=(1, 2))
        room = torch.minimum(per_head * table.shape[1], there)
        if not self.strict:
            return unstack(winners(table, room), contests)
        ordered = table.flatten(1).sort(dim=1, descending=True).values
        edge = ordered.gather(1, (room - 1).clamp(min=0)[:, None])[..., None]
        above = ((table > edge) | (table == torch.inf)).sum(dim=-1)
        whole = (room >= there)[:, None]
        return unstack(torch.where(whole, (table > _ABSENT).sum(dim=-1), above), contests)


@dataclass(frozen=True)
class CompositeLayers(LayerAllocator, name="composite"):
    """Layers compete with composite tokens: the mean over heads of each head's r-th best score (2509.05165).

    ``joined="max"`` takes the largest of them instead. All heads of a layer get as many entries. With ``first_most``
    the first layer takes, rank by rank, the most that any layer offers, so that it keeps at least as many as any other
    (as the published code does for runtimes that size masks by it). Every layer keeps ``floor`` entries a head.
    """

    first_most: bool = True
    floor: int = 1
    joined: Literal["mean", "max"] = "mean"
    scope: ClassVar[Literal["layer", "model", "joint"]] = "joint"

    def __post_init__(self) -> None:
        require(self.floor >= 1, f"floor={self.floor} must be at least 1 entry.")

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        longest = max(x.shape[-1] for x in contests)
        offered = [self.offers(x, self.joined) for x in contests]
        board = torch.stack([F.pad(x, (0, longest - x.shape[-1]), value=_ABSENT) for x in offered], dim=1)
        if self.first_most:
            board = torch.cat((board.amax(dim=1, keepdim=True), board[:, 1:]), dim=1)  # [B, L, T]
        floor = torch.arange(longest, device=board.device) < torch.minimum(per_head, torch.tensor(self.floor))[:, None]
        board = torch.where(floor[:, None] & (board > _ABSENT), torch.inf, board)
        room = torch.minimum(per_head * len(contests), (board > _ABSENT).sum(dim=(1, 2)))
        return list(winners(board, room).unbind(dim=1))

    @staticmethod
    def offers(contest: Tensor, joined: Literal["mean", "max"] = "mean") -> Tensor:
        """A layer's composite scores ``[B, T]``, best rank first; ``-inf`` where no head has so many entries."""
        ranked = contest.sort(dim=-1, descending=True).values
        if joined == "max":
            return ranked.amax(dim=1)
        there = ranked > _ABSENT
        total = ranked.masked_fill(~there, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return total.masked_fill(~there.any(dim=1), _ABSENT)


@dataclass(frozen=True)
class AgreedLayers(LayerAllocator, name="agreed"):
    """All layers keep the same tokens: what counts is a token's mean score over the layers, KV head by KV head.

    Heads of the same number choose together (2604.04921, its default). The mean is over those layers that hold the
    token: all of them, where everything else of the recipe is equal in all layers. Layers must have as many KV heads.
    """

    scope: ClassVar[Literal["layer", "model", "joint"]] = "joint"

    def share(self, contests: Sequence[Tensor], per_head: Tensor) -> list[Tensor]:
        return [per_head] * len(contests)

    def agree(self, scores: Sequence[Tensor], positions: Sequence[Tensor], valid: Sequence[Tensor]) -> list[Tensor]:
        heads = {x.shape[1] for x in scores}
        if len(heads) > 1:
            raise RecipeError(
                f"layers={self.name} lets heads of the same number choose together, but layers of this model have "
                f"{' and '.join(map(str, sorted(heads)))} KV heads. Use layers that choose for themselves."
            )
        tokens = 1 + max(int(x.max()) for x in positions)
        total = scores[0].new_zeros(*scores[0].shape[:2], tokens)  # [B, H, tokens]
        count = torch.zeros_like(total)
        for score, at, there in zip(scores, positions, valid, strict=True):
            place = at.masked_fill(~there, 0)
            total.scatter_add_(2, place, score.masked_fill(~there, 0.0).to(total.device))
            count.scatter_add_(2, place, there.to(total))
        mean = total / count.clamp(min=1)
        return [
            mean.gather(2, at.masked_fill(~there, 0)).to(score.device)
            for score, at, there in zip(scores, positions, valid, strict=True)
        ]
