"""One layer's entries: a table of pages for each (sequence, head), lengths that may all differ, true positions.

Two numbers are never confused: how many tokens a sequence has seen (the caller's business) and how many entries a
head holds (``lengths``). Entries of a head stand in position order. Where every head holds as many pages and nobody
shares them, the pages lie in table order and reading is a view; otherwise it is one gather. Keys and values may be in
few bits; then each head's newest page is as the model gave it, in a tail, and reading makes all of them so again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError, RecipeError
from kvthrift.kernels.codes import Format
from kvthrift.kernels.paged import Paged, paged_append, unfit
from kvthrift.store.fresh import fresh_slots, fresh_table, most_pages, on_device
from kvthrift.store.pool import PagePool
from kvthrift.store.table import Lengths, PageTable, settle
from kvthrift.store.tail import Tail, read_bytes

__all__ = ["LayerStore", "Lengths", "StoreView"]


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


class LayerStore(PageTable):
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

    def replace(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        lengths: Lengths | Tensor,
        *,
        planes: Mapping[str, Tensor] | None = None,
        form: Format | None = None,
    ) -> None:
        """Hold these entries and nothing else, in fresh pages; the old ones are given back.

        Args:
            keys, values: ``[N, Dk]``, ``[N, Dv]``, ordered by (sequence, head, position).
            positions: ``[N]`` int64.
            lengths: ``[B, H]`` int64, summing to N. Those on a device are not waited for: a few more pages are held
                until the host asks for lengths, or :func:`settle` is called.
            planes: ``[N]`` each; the store holds these planes from now on, and no others.
            form: how full pages are written from now on; None for as they are.
        """
        entries = len(positions)
        known = self._renew(lengths, tuple(planes or {}), form, entries)
        sources = {"positions": positions.to(torch.int32), **(planes or {})}
        if self.tail is None:
            sources |= {"keys": keys, "values": values}
        elif known is not None:
            self.tail.fill(self.pool, keys, values, known.reshape(-1), self._table)
        if known is not None and self._dense and (known == known.flat[0]).all():
            for name, source in sources.items():
                shape = (*known.shape, int(known.flat[0]), *source.shape[1:])
                self._rectangle(self._tensor(name))[:, :, : shape[2]] = source.reshape(shape)
            return
        on = self.late if known is None else on_device(known, self.device)
        if entries and on is not None:
            slots = fresh_slots(on.reshape(-1), entries, self.page)
            for name, source in sources.items():
                self._tensor(name).flatten(0, 1).index_copy_(0, slots, source)

    def _renew(
        self, lengths: Lengths | Tensor, planes: tuple[str, ...], form: Format | None, entries: int
    ) -> Lengths | None:
        """Own fresh pages for so many entries, and nothing else; their lengths, where the host knows them."""
        self._release()
        form = self._fitting(form)
        self.batch, rows = lengths.shape[0], lengths.shape[0] * lengths.shape[1]
        if isinstance(lengths, Tensor) and form is not None:
            lengths = lengths.cpu().numpy()  # pages in few bits are written by heads
        if isinstance(lengths, Tensor):
            self.pool = self._new_pool(planes, form, most_pages(rows, entries, self.page))
            self.lengths = np.zeros(lengths.shape, dtype=np.int64)
            self._set_table(self._table)
            self.late, self._promised = lengths, entries
        else:
            table = fresh_table(lengths.reshape(-1), self.page)
            self.pool = self._new_pool(planes, form, int((table >= 0).sum()))
            self.lengths = lengths.copy()
            self._set_table(table)
        self.tail = self._empty_tail(rows)
        return None if isinstance(lengths, Tensor) else self._lengths

    def rewrite(self, form: Format | None) -> None:
        """Write full pages in another form from now on, and those that are held again."""
        if form == self.form:
            return
        valid, view, positions = self.valid(), self.read(), self.positions()
        planes = {name: self.plane(name)[valid] for name in self.pool.planes}
        keys, values, positions = view.keys[valid], view.values[valid], positions[valid]
        del view
        self.replace(keys, values, positions, self.lengths.copy(), planes=planes, form=form)

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

    def write(self, plane: str, values: Tensor) -> None:
        """Set a plane from ``[B, H, T]``, T the longest head."""
        self._own(np.zeros(self.lengths.size, dtype=np.int64), np.full(self.lengths.size, self.table.shape[1]))
        if self._dense and self.uniform:
            self._rectangle(self.pool.planes[plane])[:, :, : self.longest] = values
            return
        slots = self._slots(*np.nonzero(np.arange(self.longest) < self.lengths.reshape(-1, 1)))
        self.pool.planes[plane].view(-1).index_copy_(0, slots, values[self.valid()].float())

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

    # -- pages ---------------------------------------------------------------------------------------------------

    def next_slots(self) -> Tensor:
        """Flat slot numbers of the entries that come next, one for each head; the host is not asked."""
        paged = self.paged()
        at = paged.lengths.long()[:, None]
        return (paged.table.gather(1, at // self.page).long() * self.page + at % self.page)[:, 0]

    def _new_pool(self, planes: tuple[str, ...], form: Format | None, total: int = 0) -> PagePool:
        shape = self.shape
        return PagePool(self.page, shape.key_dim, shape.value_dim, self.dtype, self.device, planes, form, total)

    def _fitting(self, form: Format | None) -> Format | None:
        why = None if form is None else form.unfit(self.shape.key_dim, self.shape.value_dim)
        if why is not None:
            raise RecipeError(f"{why}. Leave the codec out.")
        return form

    def _empty_tail(self, rows: int) -> Tail | None:
        if self.form is None:
            return None
        dims = self.shape.key_dim, self.shape.value_dim
        return Tail.empty(self.form, rows, self.page, dims, self.dtype, self.device)
