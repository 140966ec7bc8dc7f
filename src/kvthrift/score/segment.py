"""Scores raised where the newest query looks at a whole segment of the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.window import WindowAttention, window_rows


def _window() -> Scorer:
    return WindowAttention(window=8, queries="sum")


@dataclass(frozen=True)
class SegmentGuided(Scorer, name="segment_guided"):
    """Any attention score, times one plus ``alpha`` times the weight of the token's segment (2510.22556).

    From the newest query alone, a[h, i] its attention over all entries in query head h, for each segment: importance I,
    the mean over its tokens of the sum over heads of a; spread D, the mean over its tokens of the entropy of how heads
    share the token's attention (normalised over heads: the paper's code has a form that is not); weight
    I * (1 + ``eta`` * D), the same for all heads. The newest ``window`` entries belong to no segment.
    """

    base: Scorer = field(default_factory=_window)
    alpha: float = 0.9
    eta: float = 1.0
    window: int = 8
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            self.base.is_mass,
            f"{self.base.name} scores may be negative, so raising them by a segment's weight means nothing. Use a base "
            "whose scores are attention.",
        )
        require(self.alpha >= 0, f"alpha={self.alpha} must be 0 or more.")
        require(self.eta >= 0, f"eta={self.eta} must be 0 or more.")
        require(self.window >= 0, f"window={self.window} must be 0 or more entries.")

    @property
    def model(self) -> str:
        return self.base.model

    @property
    def needs(self) -> Signals:
        return self.base.needs | Signals(window=1, segments=True)

    def score(self, view: LayerView) -> Tensor:
        importance, spread = segment_weights(view, self.window)
        weight = importance * (1 + self.eta * spread)
        segment = view.segment_of
        found = weight.gather(1, segment.flatten(1)).view(segment.shape)
        return self.base.score(view) * (1 + self.alpha * found)


def segment_weights(view: LayerView, window: int) -> tuple[Tensor, Tensor]:
    """Importance and spread of every segment, two tensors ``[B, S]`` float32; see :class:`SegmentGuided`.

    Args:
        view: a layer with the newest query and the text's segments.
        window: newest entries that are left out.
    """
    rows = window_rows(view, 1)[:, :, :, 0]  # [B, H, G, T]
    b, h, group, t = rows.shape
    use = view.valid & ~view.tail(window)
    place = view.positions.masked_fill(~use, 0)
    tokens = max(int(view.seen.max()), 1)
    at = place[:, :, None].expand(b, h, group, t)
    given = torch.where(use[:, :, None], rows, 0.0)
    a = rows.new_zeros(b, h, group, tokens).scatter_add_(-1, at, given).flatten(1, 2)  # [B, HG, P]
    there = rows.new_zeros(b, tokens).scatter_add_(1, place.flatten(1), use.flatten(1).float()) > 0
    total = a.sum(dim=1)
    share = a / (total[:, None] + 1e-16)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(dim=1)  # [B, P]
    segment = view.segment_at(torch.arange(tokens, device=rows.device).expand(b, tokens))
    size = max(int(segment.max()), int(view.segment_of.max())) + 1
    members = rows.new_zeros(b, size).scatter_add_(1, segment, there.float()).clamp(min=1)
    importance, spread = (
        rows.new_zeros(b, size).scatter_add_(1, segment, x.masked_fill(~there, 0.0)) / members for x in (total, entropy)
    )
    return importance, spread
