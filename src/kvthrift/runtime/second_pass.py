"""A second pass over a context that was read whole: attention as ever, nothing appended, what it looks at kept.

Knows no model library: who feeds the tokens, and which, is an integration's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import SecondPass
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
        own = kernels.attend(q, k, v, scale=scale, causal=True, need_lse=True)
        stored = kernels.attend(q, read.keys, read.values, scale=scale, bias=read.bias, need_lse=True)
        if own.lse is None or stored.lse is None:
            raise ValueError("a second pass needs the log-sum-exp of what it attends to")
        if self.wanted.among == "all":
            lse, keys = torch.logaddexp(own.lse, stored.lse), read.keys
        else:
            sinks, chunk = slice(0, self.wanted.sinks), slice(self.start, self.stop)
            near = [torch.cat((x[:, :, sinks], x[:, :, chunk]), dim=2) for x in (read.keys, read.values)]
            seen = kernels.attend(q, near[0], near[1], scale=scale, need_lse=True).lse
            if seen is None:
                raise ValueError("a second pass needs the log-sum-exp of what it attends to")
            lse, keys = torch.logaddexp(own.lse, seen), read.keys[:, :, chunk]
        mean = self.wanted.queries == "mean"
        self._join(place, kernels.received_attention(q, keys, scale=scale, lse=lse, mean=mean), q.shape[2])
        return kernels.merge((stored, own)).out

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
