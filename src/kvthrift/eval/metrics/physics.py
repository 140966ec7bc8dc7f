"""What eviction did to the tokens an answer needs (2603.01426): who kept them, and where heads look.

Metrics of survival sets and of attention peaks, as numpy arrays; how those are read off a cache is not known here.
Layers may differ in heads. "Layer" variants ask whether a token is gone from all heads of one layer, averaged over
layers; "model" variants whether it is gone from every head of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ALARM = 0.10  # a global eviction ratio from here on is flagged


def survived(positions: Sequence[Sequence[Ints]], tokens: Ints) -> list[Bools]:
    """Which of ``tokens [T]`` each head still holds.

    Args:
        positions: true positions held, layer by layer and head by head.
        tokens: positions asked about.

    Returns:
        One ``[H, T]`` a layer.
    """
    return [np.stack([np.isin(tokens, held) for held in heads]) for heads in positions]


@dataclass(frozen=True)
class Erasure:
    """Share of tokens that nobody holds any more: by layer (mean), and in the whole model."""

    layer: float
    model: float


def erased(kept: Sequence[Bools]) -> Erasure:
    """Share of tokens no head kept, given ``[H, T]`` a layer: the eviction rate of a context, the GER of a span."""
    if not kept or not kept[0].shape[1]:
        return Erasure(0.0, 0.0)
    gone = np.stack([~layer.any(axis=0) for layer in kept])  # [L, T]
    return Erasure(float(gone.mean()), float(gone.all(axis=0).mean()))


def removed(kept: Sequence[Bools]) -> float:
    """Share of (head, token) pairs that are gone: alpha."""
    total = sum(layer.size for layer in kept)
    return 1 - sum(int(layer.sum()) for layer in kept) / total if total else 0.0


def chance(kept: Sequence[Bools]) -> Erasure:
    """Expected erasure if every head dropped as many tokens as it did, but independently and at random.

    With alpha removed from each of H heads this is alpha^H a layer.
    """
    if not kept or not kept[0].shape[1]:
        return Erasure(0.0, 0.0)
    layers = [float((1 - layer.mean(axis=1)).prod()) for layer in kept]
    return Erasure(float(np.mean(layers)), float(np.prod(layers)))


def consensus(peaks: Ints) -> float:
    """Different tokens that heads look at most, as a share of the heads: ``peaks [HG]``; low is rigid."""
    return len(np.unique(peaks)) / len(peaks)


def rigidity(peaks: Ints) -> float:
    """Largest share of heads that look at one token most: ``peaks [HG]``; 1 where all do."""
    return int(np.unique(peaks, return_counts=True)[1].max()) / len(peaks)


@dataclass(frozen=True)
class Decomposition:
    """Failures split by whether what the answer needs was erased; a conditional without cases is None.

    P(fail) = P(fail | erased) P(erased) + P(fail | kept) P(kept). ``cases``: samples counted.
    """

    failed: float
    erased: float
    failed_if_erased: float | None
    failed_if_kept: float | None
    cases: int


def decompose(failed: Sequence[bool], gone: Sequence[bool]) -> Decomposition | None:
    """Split the failures of samples, given for each whether it failed and whether its tokens were erased."""
    wrong, lost = np.asarray(failed, dtype=bool), np.asarray(gone, dtype=bool)
    if not wrong.size:
        return None
    return Decomposition(
        failed=float(wrong.mean()),
        erased=float(lost.mean()),
        failed_if_erased=float(wrong[lost].mean()) if lost.any() else None,
        failed_if_kept=float(wrong[~lost].mean()) if (~lost).any() else None,
        cases=int(wrong.size),
    )
