"""What a few chosen query heads of a layer look at, for all KV heads alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.errors import ModelMismatchError
from kvthrift.kernels import window_attention
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.window import Pool, smooth


def pooled_rows(rows: Tensor, pool: Pool, kernel: int) -> Tensor:
    """Sum over the window's queries, then pool along the entries: ``[..., W, T] -> [..., T]``."""
    return smooth(rows.sum(dim=-2), pool, kernel)


@dataclass(frozen=True)
class ChosenHeads(Scorer, name="chosen_heads"):
    """Window attention of the query heads that are best at finding meaning, mean over them (2508.02401).

    Softmax of the last ``window`` queries of the chosen heads over the entries of their KV heads; the window's own
    columns are left out; sum over the queries; pool along the entries, head by head; mean over the heads. All KV heads
    get the same score for a token. Only the chosen heads are computed. Where heads hold different tokens, what a chosen
    head does not hold got nothing from it.

    ``ranked[l]`` lists query heads of the model's layer ``l``, best first, of which the first ``count`` are asked;
    an empty table asks the first ones by number. ``model`` is the fingerprint of the model they were measured on.
    """

    ranked: tuple[tuple[int, ...], ...] = ()
    count: int = 4
    window: int = 8
    pool: Pool = "avg"
    kernel: int = 5
    model: str = ""
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.count >= 1, f"count={self.count} must be at least 1 head.")
        require(self.window >= 1, f"window={self.window} must be at least 1 query.")
        require(
            self.kernel >= 1 and self.kernel % 2 == 1, f"kernel={self.kernel} must be odd, so that it has a centre."
        )
        require(all(h >= 0 for row in self.ranked for h in row), "query heads are numbered from 0.")
        require(all(len(set(row)) == len(row) and row for row in self.ranked), "a layer's heads are listed once each.")

    def __str__(self) -> str:
        return f"{self.name}({self.count} of {len(self.ranked)} layers, window={self.window}, kernel={self.kernel})"

    @property
    def needs(self) -> Signals:
        return Signals(window=self.window)

    def score(self, view: LayerView) -> Tensor:
        if view.queries is None or view.query_positions is None:
            raise ValueError("the runtime did not gather the window queries that were declared")
        b, kv_heads, t = view.valid.shape
        asked = torch.tensor(self.heads(view), device=view.keys.device)
        owner = asked // view.group  # the KV head of each chosen query head
        window = view.tail(self.window)[:, owner]
        rows = window_attention(
            view.queries[:, asked, -self.window :],
            view.keys[:, owner],
            q_positions=view.query_positions[:, -self.window :],
            k_positions=view.positions[:, owner],
            valid=view.valid[:, owner],
            scale=view.scale,
            bias=None if view.bias is None else view.bias[:, owner],
        )[:, :, 0]  # [B, K, W, T]
        pooled = pooled_rows(rows.masked_fill(window[:, :, None], 0.0), self.pool, self.kernel)
        pooled = pooled.masked_fill(window | ~view.valid[:, owner], 0.0)
        place = view.positions.masked_fill(~view.valid, 0)
        by_position = pooled.new_zeros(b, len(asked), max(int(view.seen.max()), t))
        by_position.scatter_add_(2, place[:, owner], pooled)
        mean = by_position.mean(dim=1, keepdim=True).expand(b, kv_heads, -1)
        return mean.gather(2, place).masked_fill(view.tail(self.window) | ~view.valid, 0.0)

    def heads(self, view: LayerView) -> list[int]:
        """The query heads that are asked in a layer.

        Raises:
            ModelMismatchError: the table is for fewer layers or more heads than this model has.
        """
        there = view.keys.shape[1] * view.group
        if not self.ranked:
            return list(range(min(self.count, there)))
        number = view.numbers[view.layer] if view.numbers else view.layer
        if number >= len(self.ranked) or max(self.ranked[number]) >= there:
            most = max(max(row) for row in self.ranked) + 1
            raise ModelMismatchError(
                f"the table of retrieval heads is for {len(self.ranked)} layers of {most} query heads, but this model "
                f"has at least {number + 1} of {there}. Calibrate for this model and give that file."
            )
        return list(self.ranked[number][: self.count])
