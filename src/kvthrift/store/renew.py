"""Laying a layer's entries out anew: other entries in fresh pages, or the same in another form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvthrift.errors import RecipeError
from kvthrift.kernels.codes import Format
from kvthrift.store.fresh import fresh_slots, fresh_table, most_pages, on_device
from kvthrift.store.pool import PagePool
from kvthrift.store.read import Readable
from kvthrift.store.table import Lengths
from kvthrift.store.tail import Tail


class Renewable(Readable):
    """A store whose entries can all be replaced."""

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
