"""Pages: fixed runs of entries in one tensor each for keys, values, positions and optional planes.

Keys and values may be in few bits; then scales and least numbers (``marks``) go with them.

A page belongs to one head of one sequence, or is shared by forks and counted. Knows nothing of which entry is where.

Invariants (``check``): every page is either free or owned, never both; a page's count is the number of tables that
list it; a page handed out is zero, so that reading its unused tail is harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvthrift.errors import CacheStateError, NoRoomError
from kvthrift.kernels.codes import Coded, Format, groups
from kvthrift.store.fresh import Pages, on_device


class PagePool:
    """A growable set of pages.

    Args:
        page: entries a page.
        key_dim, value_dim: head dims.
        dtype, device: of keys and values.
        planes: names of float32 numbers kept beside each entry.
        form: how keys and values are written; None for as they are.
        total: pages to begin with, zero, each with one owner.
    """

    def __init__(
        self,
        page: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        planes: tuple[str, ...] = (),
        form: Format | None = None,
        total: int = 0,
    ) -> None:
        self.page = page
        self.form = form
        self.marks: dict[str, Tensor] = {}
        zeros = partial(torch.zeros, device=device)
        with torch.inference_mode(False):  # so that it may be written to in and out of inference mode
            if form is None:
                self.keys = zeros((total, page, key_dim), dtype=dtype)
                self.values = zeros((total, page, value_dim), dtype=dtype)
            else:
                self.keys = zeros((total, page, key_dim // form.together), dtype=form.unit)
                self.values = zeros((total, value_dim // form.together, page), dtype=form.unit)
                self.marks["key_marks"] = zeros((total, form.marks, key_dim), dtype=torch.float16)
                self.marks["value_marks"] = zeros((total, form.marks, groups(value_dim), page), dtype=torch.float16)
            self.positions = zeros((total, page), dtype=torch.int32)
            self.planes = {name: zeros((total, page), dtype=torch.float32) for name in planes}
        self.counts: Pages = np.ones(total, dtype=np.int64)
        self.stores = 1  # how many tables list pages from here

    @property
    def total(self) -> int:
        """Pages there are."""
        return len(self.counts)

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return int((self.counts == 0).sum())

    @property
    def bytes(self) -> int:
        """Bytes of the live tensors, free pages included."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def entry_bytes(self) -> int:
        """Bytes that one entry takes, metadata included."""
        return sum(
            t[0:1].numel() * t.element_size() // self.page if t.shape[0] else self._row(t) for t in self.tensors()
        )

    @staticmethod
    def _row(t: Tensor) -> int:
        return int(np.prod(t.shape[2:], dtype=np.int64)) * t.element_size()

    def tensors(self) -> list[Tensor]:
        """Keys, values, positions, then marks and planes."""
        return [self.keys, self.values, self.positions, *self.marks.values(), *self.planes.values()]

    @property
    def coded(self) -> Coded | None:
        """Keys and values, if they are in few bits."""
        return None if self.form is None else Coded(self.form, self.keys, self.values, **self.marks)

    def take(self, count: int) -> Pages:
        """Hand out ``count`` zeroed pages, growing if there are too few free ones."""
        if count > self.free:
            self.resize(self.total + count - self.free)
        pages = np.flatnonzero(self.counts == 0)[:count]
        self.counts[pages] = 1
        if count and pages[-1] - pages[0] == count - 1:
            for tensor in self.tensors():
                tensor[pages[0] : pages[-1] + 1] = 0
        elif count:
            index = on_device(pages, self.keys.device)
            for tensor in self.tensors():
                tensor.index_fill_(0, index, 0)
        return pages

    def resize(self, total: int) -> None:
        """Make room for ``total`` pages, keeping what the first of them hold; only free pages may be cut off."""
        if (self.counts[total:] != 0).any():
            raise CacheStateError(f"pages beyond {total} are still owned, so the pool cannot shrink to that.")
        before, kept = self.total, min(total, self.total)
        self._exchange(total, lambda t: _resized(t, total, kept), lambda t: t[:before])
        counts = np.zeros(total, dtype=np.int64)
        counts[:kept] = self.counts[:kept]
        self.counts = counts

    def widen(self, rows: int, width: int) -> None:
        """Lay pages that stand as ``rows`` equal rows out as rows of ``width`` pages; new ones are zero and owned."""
        before = self.total // rows
        self._exchange(
            rows * width,
            lambda t: _widened(t, rows, width),
            lambda t: t.view(rows, width, *t.shape[1:])[:, :before].flatten(0, 1),
        )
        self.counts = np.ones(rows * width, dtype=np.int64)

    def _exchange(self, total: int, change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        """Lay every tensor out anew, one after the other, or leave all as they were if memory runs out on the way."""
        places: list[tuple[dict[str, Any], str]] = [(vars(self), name) for name in ("keys", "values", "positions")]
        places += [(parts, name) for parts in (self.marks, self.planes) for name in parts]
        for done, (holder, name) in enumerate(places):
            try:
                holder[name] = change(holder[name])
            except (MemoryError, RuntimeError) as error:
                for changed, which in places[:done]:
                    changed[which] = back(changed[which])
                if not _is_lack_of_memory(error):
                    raise
                raise NoRoomError(self._lack(total)) from error

    def _lack(self, total: int) -> str:
        size = sum(int(np.prod(t.shape[1:])) * t.element_size() for t in self.tensors())
        return (
            f"out of memory: {total} pages of {self.page} entries take {total * size / 2**20:.1f} MiB of "
            f"{self.keys.device.type}, beside the {self.bytes / 2**20:.1f} MiB of the {self.total} pages there are "
            "until those are copied. Free memory, give a smaller budget, or compress while decoding (every=N)."
        )

    def share(self, pages: Pages) -> None:
        """One more owner for each of ``pages``."""
        np.add.at(self.counts, pages, 1)

    def release(self, pages: Pages) -> None:
        """One owner fewer for each of ``pages``; a page without owners is free."""
        np.subtract.at(self.counts, pages, 1)
        if (self.counts[pages] < 0).any():
            raise CacheStateError("a page was released more often than it was owned.")

    def copy(self, source: Pages, target: Pages) -> None:
        """Copy whole pages."""
        src, dst = on_device(source, self.keys.device), on_device(target, self.keys.device)
        for tensor in self.tensors():
            tensor.index_copy_(0, dst, tensor.index_select(0, src))

    def trim(self) -> None:
        """Give back the free pages at the end of the pool."""
        owned = np.flatnonzero(self.counts)
        total = int(owned[-1]) + 1 if len(owned) else 0
        if total < self.total:
            self.resize(total)


def _is_lack_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


def _fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory that may be written to in and out of inference mode, whichever it was made in."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def _resized(tensor: Tensor, total: int, kept: int) -> Tensor:
    out = _fresh((total, *tensor.shape[1:]), tensor.dtype, tensor.device)
    out[:kept] = tensor[:kept]
    return out


def _widened(tensor: Tensor, rows: int, width: int) -> Tensor:
    old = tensor.shape[0] // rows
    out = _fresh((rows, width, *tensor.shape[1:]), tensor.dtype, tensor.device)
    out[:, :old] = tensor.view(rows, old, *tensor.shape[1:])
    out[:, old:] = 0
    return out.flatten(0, 1)
