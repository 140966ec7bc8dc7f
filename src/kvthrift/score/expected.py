"""What queries still to come are expected to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvthrift.core import LayerView, Rope, Signals
from kvthrift.kernels import gaussian_logits
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.window import Reduce, reduce


@dataclass(frozen=True)
class ExpectedAttention(Scorer, name="expected_attention"):
    """Attention expected from Gaussian queries at the next positions, times the value norm (2510.00636).

    The prompt's pre-RoPE queries behind the first ``sinks`` tokens have mean mu and covariance S; both are turned by
    the mean rotation over the next ``future`` positions. Entry j gets softmax over j of mu.k/sqrt(d) + k.S.k/(2d),
    joined over the group (the mean as published), plus ``epsilon``, times ||v||_2. The first ``sinks`` tokens score
    highest.
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    covariance: bool = True
    value_norm: bool = True
    group: Reduce = "mean"
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.future >= 1, f"future={self.future} must be at least 1 position.")
        require(self.sinks >= 0, f"sinks={self.sinks} must be 0 or more.")
        require(self.epsilon >= 0, f"epsilon={self.epsilon} must be 0 or more.")

    @property
    def needs(self) -> Signals:
        return Signals(moments=True, moments_after=self.sinks, rope=True)

    def score(self, view: LayerView) -> Tensor:
        if view.moments is None or view.rope is None:
            raise ValueError("the runtime did not gather the query moments that were declared")
        turn = self._turn(view, view.rope)  # [B, D, D]
        mean, spread = view.moments.mean @ turn.transpose(-1, -2), None
        if self.covariance:
            spread = turn[:, None] @ view.moments.covariance @ turn.transpose(-1, -2)[:, None]
        logits = gaussian_logits(view.keys, mean, spread, view.scale)
        sink, hidden = self._sinks(view), self._hidden(view)
        logits = logits.masked_fill(hidden[:, :, None], -math.inf)
        score = reduce(logits.softmax(dim=-1).nan_to_num(0.0), self.group, 2) + self.epsilon
        if self.value_norm:
            score = score * torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        top = (score if view.full else score.masked_fill(~view.valid, 0.0)).amax(dim=-1, keepdim=True)
        return torch.where(sink, top, score)

    def _turn(self, view: LayerView, rope: Rope) -> Tensor:
        """The mean rotation ahead, which layers with the same rotary embedding share."""
        dim = view.keys.shape[-1]
        return view.once(("turn", rope, self.future, dim), lambda: mean_rotation(rope, view.seen, self.future, dim))

    def _sinks(self, view: LayerView) -> Tensor:
        return view.once(("sinks", self.sinks), lambda: (view.positions < self.sinks) & view.valid)

    def _hidden(self, view: LayerView) -> Tensor:
        """Sinks, and what is no entry."""
        return view.once(("hidden", self.sinks), lambda: self._sinks(view) | ~view.valid)


def mean_rotation(rope: Rope, seen: Tensor, future: int, dim: int) -> Tensor:
    """Mean of the RoPE matrices at positions ``seen .. seen + future - 1``: ``[B, D, D]`` float32.

    A mean of rotations, not a rotation: fast pairs shrink.
    """
    positions = seen[:, None] + torch.arange(future, device=seen.device)  # [B, F]
    angles = rope.angles(positions)  # [B, F, R/2]
    cos = angles.cos().mean(dim=1) * rope.attention_scaling
    sin = angles.sin().mean(dim=1) * rope.attention_scaling
    half, rest = cos.shape[-1], dim - 2 * cos.shape[-1]
    out = torch.diag_embed(torch.cat((cos, cos, cos.new_ones(len(seen), rest)), dim=-1))  # [B, D, D]
    out[:, : 2 * half, : 2 * half] += torch.diag_embed(sin, offset=-half) - torch.diag_embed(sin, offset=half)
    return out
