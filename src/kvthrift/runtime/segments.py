"""Which segment of its text each token belongs to. Knows token ids, and no tokenizer."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def segment_numbers(ids: Tensor, delimiters: Collection[int], mask: Tensor | None = None) -> Tensor:
    """Number of the segment at every true position, ``[B, T + 1]`` int32; a delimiter ends its segment.

    The last column, and what lies behind a padded row's tokens, stands for all text that comes later: one segment more.

    Args:
        ids: ``[B, T]``.
        delimiters: token ids that end a segment; none makes one segment of the text.
        mask: ``[B, T]``, 0 for padding on either side, or None.
    """
    ends = torch.isin(ids, torch.tensor(sorted(delimiters), dtype=ids.dtype, device=ids.device))
    real = torch.ones_like(ends) if mask is None else mask.to(ids.device).bool()
    order = (~real).long().argsort(dim=1, stable=True)  # real ones to the left
    ends, real = ends.gather(1, order), real.gather(1, order)
    number = (ends & real).long().cumsum(dim=1) - (ends & real).long()
    after = number.masked_fill(~real, 0).amax(dim=1, keepdim=True) + 1
    return torch.cat((torch.where(real, number, after), after), dim=1).to(torch.int32)


def cut_segments(numbers: Tensor, length: int) -> Tensor:
    """The same for the first ``length`` positions."""
    if length >= numbers.shape[1] - 1:
        return numbers
    kept = numbers[:, :length]
    after = kept.amax(dim=1, keepdim=True) + 1 if length else torch.zeros_like(numbers[:, :1])
    return torch.cat((kept, after), dim=1)
