"""Segments of the text as units: of each, the best blocks of the largest size that loses little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import LayerView, Signals
from kvthrift.part import require
from kvthrift.select.unit import Unit

SIZES = (13, 11, 9, 7, 5, 3, 2, 1)


@dataclass(frozen=True)
class Blocks:
    """What :meth:`SegmentBlocks.search` found.

    Attributes:
        keep: ``[B, H, T]`` bool, without protected entries.
        sizes: ``[B, H, S]`` the block size that each segment took, 0 where nothing of it stays.
        quotas: ``[B, H, S]`` entries that stay of each segment.
    """

    keep: Tensor
    sizes: Tensor
    quotas: Tensor


@dataclass(frozen=True)
class SegmentBlocks(Unit, name="segment_blocks"):
    """Blocks of consecutive entries within segments, each segment with a size of its own (2510.22556).

    The head's best single entries say how many of each segment stay. For each segment, sizes are tried from the largest
    that is not above that quota: the segment is cut into blocks from its start, as many blocks as the quota takes are
    taken by their summed score, and of their entries the quota's best. The first size whose entries hold at least the
    share ``tau`` of what single entries would hold is taken; size 1 always is. Every head keeps exactly its count:
    where a short last block leaves a segment short, its best single entries fill it. A text of one segment (it has no
    delimiter) keeps the best single entries. Scores that may be negative are lifted by the head's least one.
    """

    tau: float = 0.85
    sizes: tuple[int, ...] = SIZES

    def __post_init__(self) -> None:
        require(self.tau >= 0, f"tau={self.tau} must be 0 or more.")
        falling = all(a > b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        require(falling and self.sizes[-1:] == (1,), f"block sizes={self.sizes} must fall, and end with 1.")

    @property
    def needs(self) -> Signals:
        return Signals(segments=True)

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        return self.search(scores, counts, protected, view).keep | (protected & view.valid)

    def search(self, scores: Tensor, counts: Tensor, protected: Tensor, view: LayerView) -> Blocks:
        """The entries that stay beside protected ones; arguments as for :meth:`select`."""
        free = view.valid & ~protected
        number = view.segment_of
        count = int(number.max()) + 1  # of segments; what is not free is counted to one more
        segment = number.masked_fill(~free, count)
        ranked = scores.masked_fill(~free, float("-inf"))
        room = (counts - protected.sum(dim=-1)).clamp(min=0)
        best = kernels.best(ranked, room) & free
        mass = _mass(scores, free)
        board = _Board(segment, count, ranked)
        quota, target = board.sum(best.long()), board.sum(mass * best)
        length = board.sum(free.long())
        place = free.long().cumsum(dim=-1) - 1
        place = place - board.at(length.cumsum(dim=-1) - length)  # within its segment
        keep, done, sizes = torch.zeros_like(free), quota == 0, torch.zeros_like(quota)
        for size in self.sizes:
            if size == 1:  # blocks of one entry are the best single entries
                taken = best
            elif not bool((~done & (quota >= size)).any()):
                continue
            else:
                inside = _in_best_blocks(place // size, mass, free, board, length, quota, size)
                taken = board.first(inside, quota)
            held = board.sum(mass * taken)
            ratio = torch.where(target > 0, held / target.clamp(min=1e-300), torch.ones_like(target))
            fits = ~done & (quota >= size) & ((ratio >= self.tau) | (size == 1))
            keep |= taken & board.at(fits)
            sizes, done = torch.where(fits, size, sizes), done | fits
        keep |= board.first(best & ~keep, quota - board.sum(keep.long()))
        single = (length > 0)[..., :count].sum(dim=-1) < 2
        keep = torch.where(single[..., None], best, keep)
        return Blocks(keep, sizes[..., :count], quota[..., :count])


def _mass(scores: Tensor, free: Tensor) -> Tensor:
    """Scores as non-negative float64, 0 where not free."""
    found = scores.double().masked_fill(~free, 0.0)
    found = torch.where(found.isinf(), found.masked_fill(found.isinf(), 0.0).amax(dim=-1, keepdim=True) + 1, found)
    return (found - found.amin(dim=-1, keepdim=True).clamp(max=0)).masked_fill(~free, 0.0)


class _Board:
    """Sums, looks and places by segment; ``segment [B, H, T]``, those of number ``count`` do not matter."""

    def __init__(self, segment: Tensor, count: int, ranked: Tensor) -> None:
        self.segment, self.count = segment, count
        by_score = ranked.argsort(dim=-1, descending=True, stable=True)
        self.order = by_score.gather(-1, segment.gather(-1, by_score).argsort(dim=-1, stable=True))

    def sum(self, x: Tensor) -> Tensor:
        """``[B, H, T] -> [B, H, S + 1]``."""
        return x.new_zeros(*x.shape[:-1], self.count + 1).scatter_add_(-1, self.segment, x)

    def at(self, x: Tensor) -> Tensor:
        """What ``[B, H, S + 1]`` says of each entry's segment."""
        return x.gather(-1, self.segment)

    def first(self, among: Tensor, quota: Tensor) -> Tensor:
        """The ``quota [B, H, S + 1]`` highest scores of each segment ``among [B, H, T]`` bool."""
        found = among.gather(-1, self.order).long()
        counts = self.sum(among.long())
        before = (counts.cumsum(dim=-1) - counts).gather(-1, self.segment.gather(-1, self.order))
        allowed = quota.gather(-1, self.segment.gather(-1, self.order))
        taken = (found > 0) & (found.cumsum(dim=-1) - before <= allowed)
        return torch.zeros_like(among).scatter_(-1, self.order, taken) & among


def _in_best_blocks(
    block: Tensor, mass: Tensor, free: Tensor, board: _Board, length: Tensor, quota: Tensor, size: int
) -> Tensor:
    """Entries ``[B, H, T]`` bool in the blocks that each segment's quota takes; ``block`` is numbered within it."""
    blocks = (-(-length // size)).index_fill(-1, torch.tensor([board.count], device=length.device), 0)  # [B, H, S + 1]
    start = blocks.cumsum(dim=-1) - blocks
    most = int(blocks.sum(dim=-1).max())  # number of what is not free
    name = (board.at(start) + block).masked_fill(~free, most)
    value = mass.new_zeros(*mass.shape[:-1], most + 1).scatter_add_(-1, name, mass)
    owner = torch.full_like(value, board.count, dtype=torch.long).scatter_(-1, name, board.segment)
    by_value = value.argsort(dim=-1, descending=True, stable=True)
    order = by_value.gather(-1, owner.gather(-1, by_value).argsort(dim=-1, stable=True))
    steps = torch.arange(most + 1, device=mass.device)
    rank = torch.empty_like(order).scatter_(-1, order, steps - start.gather(-1, owner.gather(-1, order)))
    return (rank < (-(-quota // size)).gather(-1, owner)).gather(-1, name) & free
