"""A second pass over a context that was read whole: attention as ever, nothing appended, what it looks at kept.

Knows no model library: who feeds the tokens, and which, is an integration's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import AttentionOutput, SecondPass
from kvthrift.errors import CacheStateError

if TYPE_CHECKING:
    from kvthrift.runtime.layer import LayerCache


class SecondLook:
    """What is gathered while a context is fed again; put it in :attr:`CacheState.look` of a fork for each pass.

    Args:
        wanted: what to gather.
        length: tokens ``T`` of the context, every one of which every head holds.

    Attributes:
        start, stop: positions of the context that the pass under way repeats.
    """

    def __init__(self, wanted: SecondPass, length: int) -> None:
        self.wanted = wanted
        self.length = length
        self.start, self.stop = 0, length
        self._found: dict[int, Tensor] = {}  # by place among the layers: [B, HG, T]
        self._fed: dict[int, int] = {}  # queries so far, where they are averaged over passes

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._found.values())

    def attend(self, place: int, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One layer's attention over the context and the tokens fed so far, ``[B, HG, Q, Dv]``; nothing is stored.

        Raises:
            CacheStateError: the layer does not hold the whole context.
        """
        store = layer.store
        if store is None or not store.uniform or store.longest != self.length:
            raise CacheStateError("a second pass needs the whole context, but entries are missing or were dropped.")
        read = store.read()
        own = _part(q, k, v, scale, causal=True)
        if self.wanted.among == "all":
            near, rest, keys = _part(q, read.keys, read.values, scale), [], read.keys
        else:
            near = _part(q, self._near(read.keys), self._near(read.values), scale)
            rest = [_part(q, read.keys[:, :, one], read.values[:, :, one], scale) for one in self._rest()]
            keys = read.keys[:, :, self.start : self.stop]
        lse = torch.logaddexp(_lse(own), _lse(near))
        mean = self.wanted.queries == "mean"
        self._join(place, kernels.received_attention(q, keys, scale=scale, lse=lse, mean=mean), q.shape[2])
        return kernels.merge([near, *rest, own]).out

    def _near(self, entries: Tensor) -> Tensor:
        """Sinks and the chunk that is repeated, of ``[B, H, T, D]``."""
        return torch.cat((entries[:, :, : self.wanted.sinks], entries[:, :, self.start : self.stop]), dim=2)

    def _rest(self) -> list[slice]:
        """What else is seen."""
        between = (slice(self.wanted.sinks, self.start), slice(self.stop, self.length))
        return [one for one in between if one.start < one.stop] if self.wanted.sees == "all" else []

    def _join(self, place: int, received: Tensor, fed: int) -> None:
        if place not in self._found:
            self._found[place] = received.new_zeros((*received.shape[:2], self.length))
        board = self._found[place]
        if self.wanted.among == "chunk":
            board[:, :, self.start : self.stop] = received
        elif self.wanted.queries == "max":
            torch.maximum(board, received, out=board)
        else:
            before = self._fed.get(place, 0)
            board += (received - board) * (fed / (before + fed))
            self._fed[place] = before + fed

    def scores(self, place: int, layer: LayerCache) -> Tensor:
        """What a layer's entries received, ``[B, H, T]`` float32; zeros where nothing was repeated."""
        store = layer.store
        if store is None:
            raise CacheStateError("a second pass needs the whole context, but this layer is empty.")
        shape = (store.batch, store.shape.kv_heads, self.length)
        if place not in self._found:
            return torch.zeros(shape, device=store.device)
        grouped = self._found.pop(place).view(*shape[:2], -1, self.length)
        found = grouped.amax(dim=2) if self.wanted.group == "max" else grouped.mean(dim=2)
        return found.index_fill(2, torch.arange(min(self.wanted.sinks, self.length), device=found.device), 0.0)


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False) -> AttentionOutput:
    return kernels.attend(q, k, v, scale=scale, causal=causal, need_lse=True)


def _lse(part: AttentionOutput) -> Tensor:
    if part.lse is None:
        raise ValueError("a second pass needs the log-sum-exp of what it attends to")
    return part.lse
