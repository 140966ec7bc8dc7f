"""The newest page of every head as the model gave it, in front of pages in few bits.

A head's last page is always here; what the pool has of its keys and values is not written yet. When it is full and
the next entry comes, it is written in few bits in one go. Going back into such a page reads it back, rounded as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError
from kvthrift.kernels.codes import Format, read_keys, read_values, write_keys, write_values
from kvthrift.store.fresh import Pages, on_device
from kvthrift.store.pool import PagePool

_AT_ONCE = 1024  # pages


class Tail:
    """The last pages of all rows (heads of all sequences).

    Args:
        form: how full pages are written.
        keys, values: ``[rows, page, Dk]``, ``[rows, page, Dv]``, finite.
    """

    def __init__(self, form: Format, keys: Tensor, values: Tensor) -> None:
        self.form = form
        self.keys, self.values = keys, values
        self.shared = False  # a fork reads these very tensors

    @classmethod
    def empty(
        cls, form: Format, rows: int, page: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Tail:
        """Of rows without entries."""
        with torch.inference_mode(False):
            keys, values = (torch.zeros(rows, page, dim, dtype=dtype, device=device) for dim in dims)
        return cls(form, keys, values)

    @property
    def page(self) -> int:
        """Entries a page."""
        return self.keys.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the live tensors."""
        return self.keys.nbytes + self.values.nbytes

    # -- writing -------------------------------------------------------------------------------------------------

    def append(self, pool: PagePool, keys: Tensor, values: Tensor, start: Pages, added: Pages, table: Pages) -> None:
        """Put entries behind those of every row, and write the pages that this fills.

        Args:
            pool: whose pages ``table [rows, width]`` lists, none of those written to shared.
            keys, values: ``[rows, T, Dk]``, ``[rows, T, Dv]``, left-aligned.
            start, added: ``[rows]`` entries before, and how many of the T are real.
        """
        self.own()
        first, last = (np.maximum(count - 1, 0) // self.page for count in (start, start + added))
        base = start - first * self.page  # [rows] entries that are here
        if keys.shape[1] == 1 and (added == 1).all():
            full = np.flatnonzero(last > first)
            if len(full):
                self._write(pool, self._on(full), table[full, first[full]], self.keys, self.values)
            self._put(self.keys, self.values, keys, values, base % self.page, added)
            return
        steps = np.arange(int((last - first).max(initial=0)) + 1)
        filled = steps < (last - first)[:, None]  # [rows, pages]
        pages = table[np.nonzero(filled)[0], (first[:, None] + steps)[filled]]
        places, newest = self._on(np.flatnonzero(filled)), self._on(np.arange(len(base)) * len(steps) + last - first)
        work_k, work_v = _extended(self.keys, len(steps)), _extended(self.values, len(steps))
        self._put(work_k, work_v, keys, values, base, added)
        pages_k, pages_v = (t.view(-1, self.page, t.shape[2]) for t in (work_k, work_v))
        self._write(pool, places, pages, pages_k, pages_v)
        self.keys, self.values = (_lasting(t.index_select(0, newest)) for t in (pages_k, pages_v))

    def fill(self, pool: PagePool, keys: Tensor, values: Tensor, lengths: Pages, table: Pages) -> None:
        """Write entries ``[N, Dk]``, ``[N, Dv]``, ordered by row, into fresh pages; ``lengths [rows]`` sum to N."""
        self.own()
        counts = -(-lengths // self.page)
        begin = np.cumsum(counts) - counts  # [rows] the first of a row's pages among all
        steps = np.arange(int(lengths.max(initial=0)))
        slots = self._on((begin[:, None] * self.page + steps)[steps < lengths[:, None]])
        parts = []
        for source in (keys, values):
            work = source.new_zeros(int(counts.sum()) * self.page, source.shape[1])
            parts.append(work.index_copy_(0, slots, source).view(-1, self.page, source.shape[1]))
        kept = np.flatnonzero(counts)
        last = begin[kept] + counts[kept] - 1
        older = np.delete(np.arange(int(counts.sum())), last)
        listed = np.arange(table.shape[1]) < counts[:, None]
        self._write(pool, self._on(older), np.delete(table[listed], last), *parts)
        for mine, part in zip((self.keys, self.values), parts, strict=True):
            mine.index_copy_(0, self._on(kept), part.index_select(0, self._on(last)))

    def rewind(self, pool: PagePool, before: Pages, after: Pages, table: Pages) -> None:
        """Read back the pages that are some rows' last ones now; ``before, after [rows]`` entries."""
        was, now = (np.maximum(count - 1, 0) // self.page for count in (before, after))
        rows = np.flatnonzero((now != was) & (after > 0))
        coded = pool.coded
        if not len(rows) or coded is None:
            return
        self.own()
        pages, index = self._on(table[rows, now[rows]]), self._on(rows)
        self.keys.index_copy_(0, index, read_keys(coded, pages, self.keys.dtype))
        self.values.index_copy_(0, index, read_values(coded, pages, self.values.dtype))

    def own(self) -> None:
        """Stop sharing with forks: what follows is written."""
        if self.shared:
            self.keys, self.values, self.shared = _lasting(self.keys.clone()), _lasting(self.values.clone()), False

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, pool: PagePool, index: Tensor, lengths: Pages) -> Iterator[Tensor]:
        """Keys, then values, of all rows: ``[rows, width * page, D]``.

        Args:
            pool: where the pages are.
            index: ``[rows * width]`` pages; any page where a row has none.
            lengths: ``[rows]`` entries.
        """
        coded, rows = pool.coded, len(lengths)
        assert coded is not None
        kept = np.flatnonzero(lengths)
        width = len(index) // max(rows, 1)
        newest = self._on(kept * width + (lengths[kept] - 1) // self.page)
        for read, mine in ((read_keys, self.keys), (read_values, self.values)):
            out = read(coded, index.long(), mine.dtype)
            out.index_copy_(0, newest, mine.index_select(0, self._on(kept)))
            yield out.view(rows, width * self.page, mine.shape[2])

    # -- rows ----------------------------------------------------------------------------------------------------

    def fork(self) -> Tail:
        """Another tail with the same entries, shared until one side writes."""
        other = Tail(self.form, self.keys, self.values)
        self.shared = other.shared = True
        return other

    def select(self, rows: Pages) -> Tail:
        """The tail of ``rows`` of the present ones, which may repeat."""
        index = self._on(rows)
        return Tail(self.form, *(_lasting(t.index_select(0, index)) for t in (self.keys, self.values)))

    # -- pages ---------------------------------------------------------------------------------------------------

    def _put(self, into: Tensor, beside: Tensor, keys: Tensor, values: Tensor, base: Pages, added: Pages) -> None:
        """Write ``keys, values [rows, T, ...]`` into rows of two tensors from places ``base`` on."""
        rows, t = keys.shape[:2]
        if (base == base[:1]).all() and (added == t).all():
            at = int(base[0]) if rows else 0
            into[:, at : at + t], beside[:, at : at + t] = keys, values
            return
        real = np.arange(t) < added[:, None]
        slots = self._on((np.arange(rows)[:, None] * into.shape[1] + base[:, None] + np.arange(t))[real])
        chosen = self._on(np.flatnonzero(real))
        for target, source in ((into, keys), (beside, values)):
            target.flatten(0, 1).index_copy_(0, slots, source.flatten(0, 1).index_select(0, chosen))

    def _write(self, pool: PagePool, places: Tensor, pages: Pages, keys: Tensor, values: Tensor) -> None:
        """Write the pages ``places`` of ``keys, values [N, page, D]`` in few bits as ``pages`` of the pool."""
        coded = pool.coded
        if coded is None or not len(pages):
            return
        sound = True
        for part, index in zip(torch.split(places, _AT_ONCE), torch.split(self._on(pages), _AT_ONCE), strict=True):
            good = write_keys(coded, index, keys.index_select(0, part))
            sound &= bool(good & write_values(coded, index, values.index_select(0, part)))
        if not sound:
            raise CacheStateError(
                f"keys or values are not finite, or so large that a float16 scale cannot express them, and "
                f"{self.form.name} has no place for such numbers. Leave the codec out."
            )

    def _on(self, numbers: Pages) -> Tensor:
        return on_device(numbers, self.keys.device)


def entry_and_head_bytes(shape: LayerShape, dtype: torch.dtype, page: int, form: Format | None) -> tuple[int, int]:
    """Bytes that keys and values take for an entry (rounded up), and for a head whatever it holds."""
    size = (shape.key_dim + shape.value_dim) * dtype.itemsize
    if form is None:
        return size, 0
    return -(-form.page_bytes(shape.key_dim, shape.value_dim, page) // page), page * size


def read_bytes(shape: LayerShape, dtype: torch.dtype, page: int, form: Format | None, lengths: Pages) -> int:
    """Bytes of keys and values, scales included, that attention over ``lengths`` entries of heads looks at."""
    size = (shape.key_dim + shape.value_dim) * dtype.itemsize
    if form is None:
        return int(lengths.sum()) * size
    older = np.maximum(lengths - 1, 0) // page  # pages in few bits
    newest = int((lengths - older * page).sum())
    return int(older.sum()) * form.page_bytes(shape.key_dim, shape.value_dim, page) + newest * size


def _extended(tail: Tensor, pages: int) -> Tensor:
    """``[rows, page, D] -> [rows, pages * page, D]``, zero behind."""
    out = tail.new_zeros(tail.shape[0], pages * tail.shape[1], tail.shape[2])
    out[:, : tail.shape[1]] = tail
    return out


def _lasting(tensor: Tensor) -> Tensor:
    """The same numbers in a tensor that may be written to in and out of inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
