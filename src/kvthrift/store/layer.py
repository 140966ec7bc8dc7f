"""One layer's entries: a table of pages for each (sequence, head), lengths that may all differ, true positions.

Two numbers are never confused: how many tokens a sequence has seen (the caller's business) and how many entries a
head holds (``lengths``). Entries of a head stand in position order. Keys and values may be in few bits; then each
head's newest page is as the model gave it, in a tail, and reading (``read.py``) makes all of them so again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError
from kvthrift.kernels.codes import Format
from kvthrift.kernels.paged import paged_append
from kvthrift.store.fresh import on_device
from kvthrift.store.pool import PagePool
from kvthrift.store.read import StoreView
from kvthrift.store.renew import Renewable
from kvthrift.store.table import Lengths, settle

__all__ = ["LayerStore", "Lengths", "StoreView"]


class LayerStore(Renewable):
    """Ragged paged storage of one layer.

    Args:
        shape: heads and head dims.
        batch: sequences.
        dtype, device: of keys and values.
        page: entries a page.
        planes: names of float32 numbers kept with each entry (``bias`` is added to logits on reading).
        form: how full pages of keys and values are written; None for as they come.

    Raises:
        RecipeError: such pages cannot be written so.
    """

    def __init__(
        self,
        shape: LayerShape,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        page: int = 64,
        planes: tuple[str, ...] = (),
        form: Format | None = None,
    ) -> None:
        self.shape = shape
        self.batch = batch
        self.page = page
        self.dtype = dtype
        self.pool = PagePool(page, shape.key_dim, shape.value_dim, dtype, device, planes, self._fitting(form))
        self.late: Tensor | None = None  # [B, H] lengths that so far only the device knows; see `settle`
        self.lengths = np.zeros((batch, shape.kv_heads), dtype=np.int64)
        self.tail = self._empty_tail(batch * shape.kv_heads)
        self._set_table(np.full((batch * shape.kv_heads, 0), -1, dtype=np.int64))

    # -- writing -------------------------------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        *,
        counts: Lengths | None = None,
        planes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add entries behind those of every head.

        Args:
            keys, values: ``[B, H, T, Dk]``, ``[B, H, T, Dv]``, left-aligned.
            positions: ``[B, T]`` int64.
            counts: ``[B]`` how many of the T are real for each sequence; all by default.
            planes: ``[B, H, T]`` a plane; zero by default.
        """
        b, h, t = keys.shape[:3]
        added = np.full(b, t, dtype=np.int64) if counts is None else counts
        start = self.lengths
        self._reserve(start + added[:, None])
        if t == 1 and counts is None and not planes and self.unfit is None:
            if self.pool.planes:
                slots = self.next_slots()
                for plane in self.pool.planes.values():
                    plane.view(-1).index_fill_(0, slots, 0)
            paged_append(keys, values, positions[:, 0], self.paged())
            self._lengths = start + 1  # the device has counted already
            return
        whole = counts is None and self._dense and self.uniform
        at = int(start.flat[0]) if whole else 0
        spread = positions[:, None, :].expand(b, h, t)
        sources = {"positions": spread.to(torch.int32)}
        if self.tail is None:
            sources |= {"keys": keys, "values": values}
        else:
            flat_keys, flat_values = keys.reshape(b * h, t, -1), values.reshape(b * h, t, -1)
            counted = np.repeat(added, h)
            self.tail.append(self.pool, flat_keys, flat_values, start.reshape(-1), counted, self.table)
        for name in self.pool.planes:
            given = (planes or {}).get(name)
            sources[name] = torch.zeros(b, h, t, device=self.device) if given is None else given.float()
        if whole:
            for name, source in sources.items():
                self._rectangle(self._tensor(name))[:, :, at : at + t] = source
        else:
            places = (start[..., None] + np.arange(t)).reshape(b * h, t)
            chosen = None
            if counts is None:
                slots = self._slots(np.arange(b * h)[:, None], places)
            else:
                real = np.broadcast_to(np.arange(t) < added[:, None, None], (b, h, t)).reshape(b * h, t)
                slots = self._slots(np.nonzero(real)[0], places[real])
                chosen = on_device(np.flatnonzero(real), self.device)
            for name, source in sources.items():
                flat = source.reshape(b * h * t, *source.shape[3:])
                self._tensor(name).flatten(0, 1).index_copy_(0, slots, flat if chosen is None else flat[chosen])
        self.lengths = start + added[:, None]

    def reserve(self, added: Lengths) -> None:
        """Own pages for ``added [B]`` more entries of every head, so that appending them takes no memory.

        Raises:
            NoRoomError: there is none; the store is as it was.
        """
        self._reserve(self.lengths + added[:, None])

    def make_room(self, count: int) -> None:
        """Own pages for ``count`` more entries of every head; planes there are zero."""
        self._reserve(self.lengths + count)
        if self.tail is not None:
            self.tail.own()
        places = self.lengths.reshape(-1, 1) + np.arange(count)
        slots = self._slots(np.arange(len(places))[:, None], places)
        for plane in self.pool.planes.values():
            plane.view(-1).index_fill_(0, slots, 0)

    def grown(self, count: int) -> None:
        """Kernels wrote and counted ``count`` entries of every head in the room that was made: count them here too."""
        self._lengths = self._lengths + count

    def rewind(self, limits: Tensor) -> None:
        """Forget every entry at position ``limits [B]`` or later."""
        if not self.longest:
            return
        before = (self.positions() < limits[:, None, None].to(self.device)) & self.valid()
        lengths = before.sum(dim=-1).cpu().numpy().astype(np.int64)
        if self.tail is not None:
            self.tail.rewind(self.pool, self.lengths.reshape(-1), lengths.reshape(-1), self.table)
        self.lengths = lengths
        if self._dense:
            return
        needed = -(-self.lengths.reshape(-1) // self.page)
        spare = np.arange(self.table.shape[1]) >= needed[:, None]
        self.pool.release(self.table[spare & (self.table >= 0)])
        self._set_table(np.where(spare, -1, self.table))

    def own(self) -> None:
        """Copy every page that a fork shares: what follows is written all over."""
        self._own(np.zeros(self.lengths.size, dtype=np.int64), np.full(self.lengths.size, self.table.shape[1]))

    def add(self, plane: str, more: Tensor) -> None:
        """Add to a plane ``[B, H, T]``, T the places of :meth:`places`, zero where there is no entry, on the device.

        Pages must be this store's :meth:`own`.
        """
        pages, more = self.pool.planes[plane], more.reshape(-1, self.page)
        if self._dense and len(pages) == len(more):
            pages.add_(more)
        else:
            pages.index_add_(0, self._index, more)

    def write(self, plane: str, values: Tensor) -> None:
        """Set a plane from ``[B, H, T]``, T the longest head."""
        self.own()
        if self._dense and self.uniform:
            self._rectangle(self.pool.planes[plane])[:, :, : self.longest] = values
            return
        slots = self._slots(*np.nonzero(np.arange(self.longest) < self.lengths.reshape(-1, 1)))
        self.pool.planes[plane].view(-1).index_copy_(0, slots, values[self.valid()].float())

    # -- sequences -----------------------------------------------------------------------------------------------

    def select(self, rows: Lengths) -> None:
        """Hold the sequences ``rows [B']`` of the present ones, which may repeat; pages are shared, not copied."""
        h = self.shape.kv_heads
        old = self.table[self.table >= 0]
        index = (rows[:, None] * h + np.arange(h)).reshape(-1)
        table = self.table[index]
        self.pool.share(table[table >= 0])
        self.pool.release(old)
        self.lengths = self.lengths[rows]
        self.batch = len(rows)
        self.tail = None if self.tail is None else self.tail.select(index)
        self._set_table(table)

    def fork(self) -> LayerStore:
        """Another store with the same entries; pages are shared until one side writes to them."""
        other = object.__new__(LayerStore)
        other.late = None
        other.shape, other.batch, other.page, other.dtype = self.shape, self.batch, self.page, self.dtype
        other.pool = self.pool if self.table.size else self._new_pool(tuple(self.pool.planes), self.form)
        other.tail = None if self.tail is None else self.tail.fork()
        if self.table.size:
            self.pool.stores += 1
        other.lengths = self.lengths.copy()
        self.pool.share(self.table[self.table >= 0])
        other._set_table(self.table.copy())
        self._set_table(self.table)
        return other

    def forget(self, names: Iterable[str]) -> None:
        """Give back planes that are no longer needed, unless a fork that shares the pages may still need them."""
        if self.pool.stores > 1:
            return
        for name in names:
            self.pool.planes.pop(name, None)

    def check_integrity(self, *others: LayerStore) -> None:
        """State the conservation law for this store and ``others``, all that share its pool.

        Raises:
            CacheStateError: a page is lost, owned twice, or the lengths do not match the tables.
        """
        settle((self, *others))
        held = np.zeros(self.pool.total, dtype=np.int64)
        for store in (self, *others):
            pages = store.table[store.table >= 0]
            np.add.at(held, pages, 1)
            room = (store.table >= 0).sum(axis=1) * store.page
            if (store.lengths.reshape(-1) > room).any():
                raise CacheStateError("a head holds more entries than its pages have room for.")
            if store.tail is not None and len(store.tail.keys) != store.lengths.size:
                raise CacheStateError("newest pages and heads differ in number.")
        if not np.array_equal(held, self.pool.counts):
            raise CacheStateError("pages owned and pages in tables differ: free + owned is not the total.")
