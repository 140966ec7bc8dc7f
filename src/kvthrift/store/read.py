"""Reading a layer's entries: as rectangles, padded where heads differ in length, or as the pages they lie in.

What only looks at a store, and its sizes. Where every head holds as many pages and nobody shares them, the pages lie in
table order and a rectangle is a view; otherwise it is one gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvthrift.errors import CacheStateError
from kvthrift.kernels.codes import Format
from kvthrift.kernels.paged import Paged, unfit
from kvthrift.store.fresh import on_device
from kvthrift.store.table import PageTable
from kvthrift.store.tail import Tail, read_bytes


@dataclass(frozen=True)
class StoreView:
    """A layer's entries as rectangles: ``keys [B, H, T, Dk]``, ``values [B, H, T, Dv]``, finite everywhere.

    ``bias [B, H, T]`` is added to logits: ``-inf`` where a head has fewer than T entries; None where all have T.
    ``lengths [B, H]`` are there if it does nothing else.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """A layer's entries without their values: ``keys [B, H, T, Dk]`` and what is known of each, ``[B, H, T]``.

    ``valid`` bool; ``positions`` integers; ``mass`` float32, log mass on the logits, where entries were folded.
    """

    keys: Tensor
    valid: Tensor
    positions: Tensor
    mass: Tensor | None


class Readable(PageTable):
    """What can be asked of a layer's entries.

    Attributes:
        dtype: of keys and values as the model gives them.
        tail: each head's newest page in front of pages in few bits, or None.
    """

    dtype: torch.dtype
    tail: Tail | None

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Entries of the longest head."""
        return int(self.lengths.max(initial=0))

    @property
    def entries(self) -> int:
        """Entries of all heads and sequences."""
        return int(self.lengths.sum())

    @property
    def bytes(self) -> int:
        """Bytes of the live tensors: pages, tail, page table on the device included."""
        lengths = sum(0 if t is None else t.nbytes for t in (self._on_device, self.late))
        tail = 0 if self.tail is None else self.tail.bytes
        return self.pool.bytes + self._index.nbytes + lengths + tail

    @property
    def payload(self) -> int:
        """Bytes of keys and values alone, free pages included."""
        tail = 0 if self.tail is None else self.tail.bytes
        return self.pool.keys.nbytes + self.pool.values.nbytes + tail

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values, scales included, that an attention over all entries looks at."""
        return read_bytes(self.shape, self.dtype, self.page, self.form, self.lengths)

    @property
    def form(self) -> Format | None:
        """How full pages are written; None for as they came."""
        return self.pool.form

    @property
    def uniform(self) -> bool:
        """Whether every head holds as many entries."""
        return bool((self.lengths == self.lengths.flat[0]).all()) if self.lengths.size else True

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self) -> StoreView:
        """All entries as rectangles of the longest head's length."""
        bias = lengths = None
        if not self.uniform:
            bias, lengths = self._absence(), self._counted().view(self.lengths.shape)
        if "bias" in self.pool.planes:
            logged = self._rectangle(self.pool.planes["bias"])[:, :, : self.longest]
            bias, lengths = logged if bias is None else bias + logged, None
        if self.tail is None:
            keys, values = (self._rectangle(t)[:, :, : self.longest] for t in (self.pool.keys, self.pool.values))
            return StoreView(keys, values, bias, lengths)
        found = self.tail.read(self.pool, self._index, self.lengths.reshape(-1))
        keys, values = (t.view(*self.lengths.shape, *t.shape[1:])[:, :, : self.longest] for t in found)
        return StoreView(keys, values, bias, lengths)

    @property
    def unfit(self) -> str | None:
        """Why kernels cannot read and write these pages where they lie; None if they can."""
        shape = self.shape
        return unfit(self.device, self.dtype, shape.key_dim, shape.value_dim, self.page, self.form)

    def paged(self) -> Paged:
        """The pages themselves, for kernels that read and write them where they lie."""
        lengths, table, pool = self._counted(), self._index.view(self.table.shape), self.pool
        if self.tail is None:
            return Paged(pool.keys, pool.values, pool.positions, table, lengths, pool.planes.get("bias"))
        self.tail.own()
        tail, bias = self.tail, pool.planes.get("bias")
        return Paged(tail.keys, tail.values, pool.positions, table, lengths, bias, pool.coded)

    def _counted(self) -> Tensor:
        """``[B * H]`` int32 lengths on the device."""
        if self._on_device is None:
            self._on_device = on_device(self.lengths.reshape(-1).astype(np.int32), self.device)
        return self._on_device

    def positions(self) -> Tensor:
        """``[B, H, T]`` int64 true positions (0 where there is no entry)."""
        longest = self.longest
        return self._rectangle(self.pool.positions)[:, :, :longest].long()

    def mass(self) -> Tensor | None:
        """``[B, H, T]`` float32 log mass on the logits, where entries were folded into others."""
        return self.plane("bias") if "bias" in self.pool.planes else None

    def plane(self, name: str) -> Tensor:
        """``[B, H, T]`` float32."""
        longest = self.longest
        return self._rectangle(self.pool.planes[name])[:, :, :longest]

    def valid(self) -> Tensor:
        """``[B, H, T]`` bool: which places hold an entry."""
        lengths = on_device(self.lengths, self.device)
        return torch.arange(self.longest, device=self.device) < lengths[..., None]

    def _absence(self) -> Tensor:
        """``[B, H, T]`` float32: 0 where a place holds an entry, ``-inf`` elsewhere."""
        if self.device.type == "cpu":  # a third of the time of torch's small operations
            held = np.arange(self.longest) < self.lengths[..., None]
            return torch.from_numpy(np.where(held, np.float32(0), np.float32(-np.inf)))
        return torch.where(self.valid(), 0.0, float("-inf"))

    def next_slots(self) -> Tensor:
        """Flat slot numbers of the entries that come next, one for each head; the host is not asked."""
        paged = self.paged()
        at = paged.lengths.long()[:, None]
        return (paged.table.gather(1, at // self.page).long() * self.page + at % self.page)[:, 0]

    def held(self) -> Held:
        """All entries but their values, as rectangles of the longest head's length."""
        return Held(self.read().keys, self.valid(), self.positions(), self.mass())

    def places(self) -> Held:
        """The same of all places in pages that are owned, filled or not, by the lengths that the device knows.

        Raises:
            CacheStateError: keys are in few bits, and which page is a head's newest is for the host to say.
        """
        if self.tail is not None:
            raise CacheStateError("places in pages of few bits are not read without the host.")
        keys, positions = self._rectangle(self.pool.keys), self._rectangle(self.pool.positions)
        lengths = self._counted().view(*self.lengths.shape, 1)
        mass = self.pool.planes.get("bias")
        valid = torch.arange(keys.shape[2], device=self.device) < lengths
        return Held(keys, valid, positions, None if mass is None else self._rectangle(mass))
