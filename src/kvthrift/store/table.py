"""A table of pages for each (sequence, head): which pages are whose, where the next entries go, who else reads them.

Lengths may come late: a layer that was cut on a device is laid out there, and the host learns how long its heads are
when it has to, or when it waits anyway. Knows nothing of what entries mean.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError
from kvthrift.store.fresh import Pages, fresh_table, on_device
from kvthrift.store.pool import PagePool

Lengths = NDArray[np.int64]


class PageTable:
    """Pages of every (sequence, head) of a layer.

    Attributes:
        shape, batch, page: heads, sequences, entries a page.
        pool: where the pages are.
        late: ``[B, H]`` lengths that so far only the device knows; see :func:`settle`.
    """

    shape: LayerShape
    batch: int
    page: int
    pool: PagePool
    late: Tensor | None
    _lengths: Lengths
    _promised: int  # entries that late lengths must sum to
    _on_device: Tensor | None
    _table: Pages
    _owned: Pages
    _dense: bool  # pages lie in table order, and nobody shares them
    _index: Tensor  # the table, [B * H * width] int32

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.pool.keys.device

    @property
    def lengths(self) -> Lengths:
        """``[B, H]`` entries of each head; replaced, never written to."""
        if self.late is not None:
            settle([self])
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Lengths) -> None:
        self._lengths = lengths
        self._on_device: Tensor | None = None  # the same, [B * H] int32, once a kernel asked for it

    @property
    def table(self) -> Pages:
        """``[B * H, width]`` pages of each head in order, -1 behind the last; replaced, never written to."""
        if self.late is not None:
            settle([self])
        return self._table

    def _tensor(self, name: str) -> Tensor:
        pool = self.pool
        return {"keys": pool.keys, "values": pool.values, "positions": pool.positions, **pool.planes}[name]

    def _set_table(self, table: Pages) -> None:
        self._table = table
        width = table.shape[1]
        in_order = np.array_equal(table.reshape(-1), np.arange(table.size))
        alone = self.pool.stores == 1 and self.pool.total == table.size
        self._dense = alone and in_order and bool((self.pool.counts == 1).all())
        filled = table if self._dense or not width else np.where(table < 0, table[:, :1].clip(min=0), table)
        self._owned = (table >= 0).sum(axis=1)
        if in_order:
            self._index = torch.arange(table.size, dtype=torch.int32, device=self.device)
        else:
            self._index = on_device(filled.reshape(-1).astype(np.int32), self.device)

    def _rectangle(self, tensor: Tensor) -> Tensor:
        """``[pages, page, ...] -> [B, H, width * page, ...]``: a view where pages lie in order, else a gather."""
        rows = tensor if self._dense and self.pool.total == self.table.size else tensor.index_select(0, self._index)
        return rows.view(self.batch, self.shape.kv_heads, self.table.shape[1] * self.page, *tensor.shape[2:])

    def _slots(self, rows: Pages, places: Pages) -> Tensor:
        """Flat slot numbers of the ``places`` within heads ``rows``; the two broadcast."""
        slots = self.table[rows, places // self.page] * self.page + places % self.page
        return on_device(slots.reshape(-1), self.device)

    def _reserve(self, lengths: Lengths) -> None:
        """Own enough private pages to hold ``lengths [B, H]`` entries and write behind the present ones."""
        needed = -(-lengths.reshape(-1) // self.page)
        enough = bool((needed <= self._owned).all())
        if enough and (self._dense or not (self.pool.counts > 1).any()):
            return
        if self._dense or not self.pool.total:
            width = int(needed.max())
            if (needed == width).all():
                self.pool.widen(len(needed), width + width // 32)
                self._set_table(np.arange(self.pool.total, dtype=np.int64).reshape(len(needed), -1))
                return
        written = self.lengths
        if self.pool.form is not None:
            written = np.maximum(written - 1, 0)  # a full tail's page is written to, too
        self._own(written.reshape(-1) // self.page, needed)
        owned = self._owned
        missing = np.maximum(needed - owned, 0)
        if not missing.any():
            return
        count = int(missing.sum())
        if count > self.pool.free:
            self.pool.resize(self.pool.total + count - self.pool.free + self.pool.total // 64)
        width = max(int((owned + missing).max()), self.table.shape[1])
        table = np.full((len(needed), width), -1, dtype=np.int64)
        table[:, : self.table.shape[1]] = self.table
        steps = np.arange(width)
        table[(steps >= owned[:, None]) & (steps < (owned + missing)[:, None])] = self.pool.take(count)
        self._set_table(table)

    def _own(self, first: Pages, stop: Pages) -> None:
        """Copy each head's pages ``first .. stop - 1`` where others share them: sharing ends with the first write."""
        steps = np.arange(self.table.shape[1])
        shared = (self.table >= 0) & (steps >= first[:, None]) & (steps < stop[:, None])
        shared[shared] = self.pool.counts[self.table[shared]] > 1
        if not shared.any():
            return
        old = self.table[shared]
        fresh = self.pool.take(len(old))
        self.pool.copy(old, fresh)
        self.pool.release(old)
        table = self.table.copy()
        table[shared] = fresh
        self._set_table(table)

    def arrive(self, lengths: Lengths) -> None:
        """Take in the lengths ``[B, H]`` that were late, and give back the pages that nothing is in.

        Raises:
            CacheStateError: they do not sum to the entries that were brought.
        """
        self.late = None
        if lengths.sum() != self._promised:
            raise CacheStateError(
                f"a layer was brought {self._promised} entries for heads of {lengths.tolist()}; scores that are not "
                "finite do that. Read the text again without compression."
            )
        self.lengths = lengths
        table = fresh_table(lengths.reshape(-1), self.page)
        self.pool.counts[int((table >= 0).sum()) :] = 0
        self.pool.trim()
        self._set_table(table)

    def _release(self) -> None:
        pages, self.late = self._table[self._table >= 0], None
        self._table = np.full((self._table.shape[0], 0), -1, dtype=np.int64)
        self.pool.release(pages)
        self.pool.stores -= 1

    def __del__(self) -> None:
        # at interpreter exit numpy, and contextlib too, may be gone before us
        try:  # noqa: SIM105
            self._release()
        except Exception:
            pass


def settle(stores: Iterable[PageTable]) -> None:
    """Tell the host the lengths that so far only devices know: one wait for all stores of a device."""
    late: dict[torch.device, list[PageTable]] = {}
    for store in stores:
        if store.late is not None:
            late.setdefault(store.late.device, []).append(store)
    for group in late.values():
        found = torch.cat([store.late.reshape(-1) for store in group if store.late is not None]).cpu().numpy()
        ends = np.cumsum([len(store._table) for store in group])
        for store, part in zip(group, np.split(found, ends[:-1]), strict=True):
            store.arrive(part.astype(np.int64).reshape(store.batch, -1))
