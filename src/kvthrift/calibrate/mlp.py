"""A small network from an entry's key and value to the logarithm of its score, one a head (2601.07891).

Knows no model library. One hidden layer with GELU, trained as the paper's is: AdamW, squared errors, a cosine from
5e-3. All heads train at once. What a network explains is measured on texts that it was not fitted to, beside what a
linear map explains of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from kvthrift.calibrate.surrogate import SMALLEST, Sums
from kvthrift.errors import CalibrationError

EPOCHS, BATCH, RATE, CLIP = 15, 512, 5e-3, 1.0
HELD_OUT = 5  # every so many texts, one is not fitted to


@dataclass(frozen=True)
class Network:
    """``w1 [L, H, F, M]``, ``b1 [L, H, M]``, ``w2 [L, H, M]``, ``b2 [L, H]``; float32."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Log scores ``[L, H, N]`` foretold of features ``[L, H, N, F]``."""
        inner = F.gelu(x @ self.w1 + self.b1[..., None, :])
        return (inner * self.w2[..., None, :]).sum(dim=-1) + self.b2[..., None]

    def rounded(self) -> Network:
        """The same in float16, as it is kept."""
        return Network(*(t.half().float() for t in (self.w1, self.b1, self.w2, self.b2)))

    def table(self) -> Tensor:
        """All of it as ``[L, H, F * M + 2 * M + 1]``, in the order of the attributes."""
        return torch.cat((self.w1.flatten(2), self.b1, self.w2, self.b2[..., None]), dim=-1)


def fit(x: Tensor, y: Tensor, width: int, *, seed: int = 0, epochs: int = EPOCHS) -> Network:
    """Train a network for every head.

    Args:
        x: features ``[L, H, N, F]``; y: log scores ``[L, H, N]``.
        width: hidden units of a head.
        seed: of first weights and batches.
        epochs: times that all entries are gone through.
    """
    rng = torch.Generator().manual_seed(seed)
    layers, heads, count, size = x.shape
    (mean, spread), (centre, scale) = _moments(x), _moments(y)
    first = torch.randn(layers, heads, size, width, generator=rng) / math.sqrt(size)
    last = torch.randn(layers, heads, width, generator=rng) / math.sqrt(width)
    found = [first, torch.zeros(layers, heads, width), last, torch.zeros(layers, heads)]
    parts = [t.requires_grad_() for t in found]
    optimizer = torch.optim.AdamW(parts, lr=RATE)
    steps = epochs * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(count, generator=rng), BATCH):
            inputs = (x[:, :, batch].float() - mean[:, :, None]) / spread[:, :, None]
            wanted = (y[:, :, batch].float() - centre[..., None]) / scale[..., None]
            loss = (Network(*parts)(inputs) - wanted).square().mean(dim=2).sum()  # heads do not touch one another
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            _clip(parts)
            optimizer.step()
            schedule.step()
    w1, b1, w2, b2 = (t.detach() for t in parts)
    inner = w1 / spread[..., None]  # what was standardised is folded in
    outer = w2 * scale[..., None]
    return Network(inner, b1 - (mean[..., None] * inner).sum(dim=2), outer, b2 * scale + centre)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread over the entries of ``[L, H, N, ...]``; the spread of what never changes is 1."""
    spread = x.float().std(dim=2)
    return x.float().mean(dim=2), torch.where(spread > 1e-6, spread, 1.0)


def _clip(parts: Sequence[Tensor]) -> None:
    """Scale each head's gradient to length 1, where it is longer."""
    grads = [t.grad for t in parts if t.grad is not None]
    norm = torch.stack([g.flatten(2).square().sum(dim=-1) if g.ndim > 2 else g.square() for g in grads]).sum(dim=0)
    factor = (CLIP / norm.sqrt().clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(*factor.shape, *(1,) * (g.ndim - 2)))


def explained(found: Tensor, wanted: Tensor) -> Tensor:
    """Share of the variance of ``wanted [L, H, N]`` that ``found`` explains, ``[L, H]``; below 0 if it does harm."""
    error = (wanted.double() - found.double()).square().sum(dim=-1)
    spread = (wanted.double() - wanted.double().mean(dim=-1, keepdim=True)).square().sum(dim=-1)
    return 1 - error / spread.clamp(min=1e-12)


def linear_fit(x: Tensor, y: Tensor) -> Tensor:
    """The ridge regression that the linear form makes of the same entries, ``[L, H, F]`` float32."""
    sums = Sums.zeros(x.shape[0], x.shape[1], x.shape[-1])
    for layer, (rows, target) in enumerate(zip(x, y, strict=True)):
        sums.add(layer, rows, target.double().exp())
    return sums.solve()[0].float()


def held_out(texts: int) -> list[int]:
    """The texts that are not fitted to: every fifth, the last one at least."""
    return [n for n in range(texts) if n % HELD_OUT == HELD_OUT - 1] or [texts - 1]


def save_pairs(path: Path, features: Tensor, scores: Tensor) -> None:
    """Keep one text's ``features [L, H, N, F]`` and ``scores [L, H, N]``, whole or not at all.

    Raises:
        CalibrationError: they cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        save_file({"x": features.half(), "y": scores.float().clamp(min=SMALLEST).log()}, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be written: {error}.") from error


def load_pairs(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Features in float16 and log scores of several texts, one behind the other.

    Raises:
        CalibrationError: a file is missing or damaged.
    """
    try:
        found = [load_file(path) for path in paths]
        return torch.cat([t["x"] for t in found], dim=2), torch.cat([t["y"] for t in found], dim=2)
    except (OSError, SafetensorError, KeyError) as error:
        raise CalibrationError(f"what was read is missing or damaged ({error}). Begin again with --force.") from error
