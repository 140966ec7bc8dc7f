"""How far two choices of entries agree, and whether what differs lies at the edge of the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEAR = 1e-4  # scores that differ by less than this share of their size are taken for equal


@dataclass(frozen=True)
class Agreement:
    """Two choices beside each other.

    Attributes:
        heads: heads that were compared.
        heads_apart: of these, those that keep other entries.
        theirs, ours: entries kept.
        common: entries that both keep.
        near: entries that one of them keeps alone, and whose score is next to that of one the other keeps instead.
        far: other entries that one keeps alone.
    """

    heads: int
    heads_apart: int
    theirs: int
    ours: int
    common: int
    near: int
    far: int

    @property
    def share(self) -> float:
        """Of all that either keeps at most, the share that both keep."""
        return self.common / max(self.theirs, self.ours, 1)

    @property
    def exact(self) -> bool:
        """Whether both keep the same entries."""
        return self.near + self.far == 0

    @property
    def rounding(self) -> bool:
        """Whether they differ only where scores are as good as equal."""
        return self.near > 0 and self.far == 0


def compare(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], scores: NDArray[np.float32] | None, rivals: str
) -> Agreement:
    """Compare two choices ``[L, H, T]``.

    Args:
        ours, theirs: which entries are kept.
        scores: ``[L, H, T]`` by which ours were chosen; None if other things decided, too.
        rivals: entries that compete for the same room: those of a "head", a "layer" or the whole "model".
    """
    layers, heads, _ = ours.shape
    groups = {"head": layers * heads, "layer": layers, "model": 1}[rivals]
    near = far = 0
    for mine, other, score in zip(
        ours.reshape(groups, -1),
        theirs.reshape(groups, -1),
        np.full((groups, 1), np.nan) if scores is None else scores.reshape(groups, -1),
        strict=True,
    ):
        extra, lost = mine & ~other, other & ~mine
        apart = int(extra.sum() + lost.sum())
        if apart and scores is not None and _swapped(score[extra], score[lost]):
            near += apart
        else:
            far += apart
    different = (ours != theirs).any(axis=-1)
    return Agreement(
        layers * heads, int(different.sum()), int(theirs.sum()), int(ours.sum()), int((ours & theirs).sum()), near, far
    )


def _swapped(extra: NDArray[np.float32], lost: NDArray[np.float32]) -> bool:
    """Whether entries with these scores could have been swapped by rounding."""
    if len(extra) != len(lost):
        return False
    both = np.concatenate((extra, lost)).astype(np.float64)
    return bool(both.max() - both.min() <= NEAR * np.abs(both).max())
