"""What a head's mean query would look at from places still to come: known offline, so that no query is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.core import LayerView, Rope, Signals
from kvthrift.errors import CalibrationError, ModelMismatchError
from kvthrift.part import require
from kvthrift.score.base import Scorer
from kvthrift.score.surrogate import unpack

TOP = 1e6  # of what is no candidate: above any standardised score, and equal, so that the first come first
_BLOCK = 8192  # entries whose float32 copies are held at a time


def turned_ahead(centre: Tensor, seen: Tensor, rope: Rope, offsets: int) -> Tensor:
    """Mean of ``centre [HG, D]`` over its rotations to the positions ``seen [B]`` + 1, 2, 4, ...: ``[B, HG, D]``.

    Against a key as it is cached, its product is what the mean query's is at those positions, averaged.
    """
    half, device = rope.inv_freq.numel(), centre.device
    speed = rope.inv_freq.to(device).double()
    ahead = speed * 2.0 ** torch.arange(offsets, device=device, dtype=torch.float64)[:, None]  # [offsets, half]
    now = (seen.to(device).double()[:, None] * speed)[:, None]  # [B, 1, half]
    turn = torch.polar(torch.ones_like(now), now) * torch.polar(torch.ones_like(ahead), ahead).mean(dim=0)
    pairs = torch.complex(centre[:, :half].double(), centre[:, half : 2 * half].double()) * turn  # [B, HG, half]
    rest = centre[:, 2 * half :].double().expand(len(seen), -1, -1)
    return torch.cat((pairs.real, pairs.imag, rest), dim=-1).float()


def centre_logits(keys: Tensor, query: Tensor, spread: Tensor, half: int) -> Tensor:
    """``[B, H, G, T]`` float32: ``query`` times each key, plus ``spread`` times the lengths of its rotated pairs.

    Args:
        keys: ``[B, H, T, D]`` as cached.
        query: ``[B, H, G, D]`` float32.
        spread: ``[H, G, half]`` float32.
        half: pairs of dims that are rotated.
    """
    parts = []
    for start in range(0, keys.shape[2], _BLOCK):
        block = keys[:, :, start : start + _BLOCK].float()
        lengths = torch.hypot(block[..., :half], block[..., half : 2 * half])  # [B, H, T, half]
        parts.append(query @ block.transpose(-1, -2) + spread @ lengths.transpose(-1, -2))
    return torch.cat(parts, dim=-1)


def standardised(x: Tensor, among: Tensor) -> Tensor:
    """``x [B, H, G, T]`` less its mean and over its spread along T, both of the places ``among [B, H, T]`` only."""
    use = among[:, :, None]
    wide = x.double().masked_fill(~use, 0.0)
    count = use.sum(dim=-1, keepdim=True).clamp(min=1)
    wide = (wide - wide.sum(dim=-1, keepdim=True) / count).masked_fill(~use, 0.0)
    deviation = (wide.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return (wide / deviation.clamp(min=1e-12)).float()


@dataclass(frozen=True)
class QueryCentres(Scorer, name="query_centres"):
    """What each query head's mean pre-RoPE query would look at from afar, the largest of the group (2604.04921).

    With m_f the mean of a head's queries at frequency f (a complex number), u_f the mean of their lengths, k_f a key
    before its rotation at position p, and t tokens so far: the sum over f of ``|m_f||k_f| cos(omega_f (t + delta - p) +
    arg(m_f conj k_f))``, averaged over ``offsets`` deltas 1, 2, 4, ..., plus ``(u_f - |m_f|)|k_f|``. Dims that are not
    rotated add mean query times key. Standardised over the candidates, query head by query head. Positions are those
    that the cached keys were turned by, so nothing is un-rotated: the mean query is turned instead.

    ``pinned``: the prompt's tokens are no candidates, and come first. ``weights`` is :func:`kvthrift.score.surrogate.
    pack` of ``[layers, heads, D + R / 2]``, the mean query and the mean lengths of its R / 2 rotated pairs, query heads
    by number, layers by the model's own numbers; ``model`` the fingerprint of the model they were measured on.
    """

    weights: str = ""
    layers: int = 0
    heads: int = 0
    offsets: int = 17
    pinned: bool = True
    model: str = ""

    def __post_init__(self) -> None:
        require(1 <= self.offsets <= 32, f"offsets={self.offsets} must lie between 1 and 32.")
        if self.weights:
            unpack(self.weights, self.layers, self.heads)

    def __str__(self) -> str:
        return f"{self.name}({self.layers} x {self.heads} query heads, offsets={self.offsets}, pinned={self.pinned})"

    @property
    def needs(self) -> Signals:
        return Signals(rope=True, prompt=self.pinned)

    def score(self, view: LayerView) -> Tensor:
        if view.rope is None or (self.pinned and view.prompt is None):
            raise ValueError("the runtime did not gather the rotary embedding or prompt that were declared")
        heads, half = view.keys.shape[1], view.rope.inv_freq.numel()
        centre, length = self._mine(view, half)
        query = turned_ahead(centre, view.seen, view.rope, self.offsets)
        spread = (length - torch.hypot(centre[:, :half], centre[:, half : 2 * half])).clamp(min=0)
        by_group = (query.view(-1, heads, view.group, query.shape[-1]), spread.view(heads, view.group, half))
        logits = centre_logits(view.keys, *by_group, half)
        stays = torch.zeros_like(view.valid)
        if self.pinned and view.prompt is not None:
            stays = view.valid & (view.positions < view.prompt[:, None, None])
        score = standardised(logits, view.valid & ~stays).amax(dim=2)
        return score.masked_fill(stays, TOP)

    def _mine(self, view: LayerView, half: int) -> tuple[Tensor, Tensor]:
        """This layer's mean queries ``[HG, D]`` and mean lengths ``[HG, half]``."""
        if not self.weights:
            raise CalibrationError("query centres without a table score nothing. Give a calibration.")
        number = view.numbers[view.layer] if view.numbers else view.layer
        table = unpack(self.weights, self.layers, self.heads)
        heads, dim = view.keys.shape[1] * view.group, view.keys.shape[-1]
        if number >= self.layers or heads != self.heads or table.shape[-1] != dim + half:
            raise ModelMismatchError(
                f"these query centres are of {self.layers} layers of {self.heads} query heads with {table.shape[-1]} "
                f"numbers, but layer {number} has {heads} heads with {dim + half}. Calibrate for this model."
            )
        mine = table[number].to(view.keys.device)
        return mine[:, :dim], mine[:, dim:]
