"""Folding each entry that goes into the most similar one that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.core import LayerView
from kvthrift.errors import RecipeError
from kvthrift.merge.base import Merged, Merger
from kvthrift.score import Scorer

_BLOCK = 512


@dataclass(frozen=True)
class MassFold(Merger, name="fold"):
    """Each dropped entry goes to the kept entry with the most similar key.

    The kept value becomes the score-weighted mean of its members, and the kept key's logit gains the log of how much
    mass it now stands for (members' scores over its own, at most the number of members). After kvfold (2026), whose
    gain is at retrieval; the published loss on LongBench is why this is an option.
    """

    biased: ClassVar[bool] = True

    def check(self, scorer: Scorer) -> None:
        if not scorer.is_mass:
            raise RecipeError(
                f"merge 'fold' weighs entries by their scores, but {scorer.name} scores are no masses (they may be "
                "negative). Use a scorer of attention mass, or merge 'evict'."
            )

    def merge(self, view: LayerView, keep: Tensor, scores: Tensor, bias: Tensor | None) -> Merged:
        target = self._nearest(view, keep)  # [B, H, T]; an entry that stays is its own target
        earlier = torch.zeros_like(scores) if bias is None else bias
        own = scores.clamp(min=1e-12)
        mass = (own * earlier.exp()).masked_fill(~view.valid, 0.0)
        members = torch.zeros_like(mass).scatter_add_(2, target, earlier.exp().masked_fill(~view.valid, 0.0))
        joined = torch.zeros_like(mass).scatter_add_(2, target, mass)
        spread = target[..., None].expand_as(view.values)
        values = torch.zeros_like(view.values, dtype=torch.float32)
        values.scatter_add_(2, spread, view.values.float() * mass[..., None])
        values = values / joined.clamp(min=1e-30)[..., None]
        gained = (joined / own).log().clamp(min=0.0)
        gained = torch.minimum(gained, members.clamp(min=1.0).log())
        stays = keep[..., None]
        return Merged(torch.where(stays, values.to(view.values.dtype), view.values), gained.masked_fill(~keep, 0.0))

    @staticmethod
    def _nearest(view: LayerView, keep: Tensor) -> Tensor:
        directions = F.normalize(view.keys.float(), dim=-1)
        t = keep.shape[-1]
        own = torch.arange(t, device=keep.device).expand(keep.shape)
        parts = []
        for start in range(0, t, _BLOCK):
            alike = directions[:, :, start : start + _BLOCK] @ directions.transpose(-1, -2)
            parts.append(alike.masked_fill(~keep[:, :, None], float("-inf")).argmax(dim=-1))
        return torch.where(keep, own, torch.cat(parts, dim=-1))
