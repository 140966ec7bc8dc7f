"""Entries laid out anew, row behind row, in pages of their own: where each goes, found without asking the host.

Also how numbers get from the host to a device, so that neither waits for the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pages = NDArray[np.int64]


def on_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """The same numbers on a device, without waiting for what is under way there."""
    whole = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type != "cuda" or not numbers.size:
        return whole.to(device)
    if (numbers == numbers.flat[0]).all():
        return torch.full(whole.shape, numbers.flat[0].item(), dtype=whole.dtype, device=device)
    return whole.pin_memory().to(device, non_blocking=True)


def fresh_table(lengths: Pages, page: int) -> Pages:
    """``[rows, width]`` pages of ``lengths [rows]`` entries, in order; -1 where a row has none."""
    needed = -(-lengths // page)
    table = np.full((len(lengths), int(needed.max(initial=0))), -1, dtype=np.int64)
    table[np.arange(table.shape[1]) < needed[:, None]] = np.arange(needed.sum())
    return table


def most_pages(rows: int, entries: int, page: int) -> int:
    """Pages that so many entries can take at most, however the rows share them."""
    return min(entries, entries // page + rows)


def fresh_slots(lengths: Tensor, entries: int, page: int) -> Tensor:
    """Flat slots ``[entries]`` of what :func:`fresh_table` lays out, ordered by row; ``lengths [rows]`` on a device."""
    ends = lengths.cumsum(dim=0)
    pages = (lengths + page - 1) // page
    shift = (pages.cumsum(dim=0) - pages) * page - ends + lengths  # from an entry's number to its slot
    numbers = torch.arange(entries, device=lengths.device)
    return numbers + shift[torch.searchsorted(ends, numbers, right=True).clamp(max=len(lengths) - 1)]
