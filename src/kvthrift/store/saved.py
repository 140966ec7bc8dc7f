"""A store as flat tensors and back, bit for bit: pages in few bits are taken as they are, not rounded again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvthrift.errors import CacheStateError
from kvthrift.kernels.codes import Format
from kvthrift.store.fresh import on_device
from kvthrift.store.layer import LayerStore, Lengths
from kvthrift.store.tail import Tail

_CODES = "codes."


def flat(store: LayerStore) -> dict[str, Tensor]:
    """Everything a store holds; entries and pages ordered by (sequence, head, position).

    Returns:
        ``positions``, ``lengths [B, H]`` and ``plane.NAME``; ``keys, values [N, D]``, which in front of pages in few
        bits are those of the tail, ``[B * H, page, D]``, with the pages as ``codes.NAME``.
    """
    valid = store.valid()
    out = {"positions": store.positions()[valid].to(torch.int32), "lengths": torch.from_numpy(store.lengths)}
    out |= {f"plane.{name}": store.plane(name)[valid] for name in store.pool.planes}
    if store.tail is None:
        view = store.read()
        return out | {"keys": view.keys[valid], "values": view.values[valid]}
    index = _pages(store, store.lengths)
    codes = {"keys": store.pool.keys, "values": store.pool.values, **store.pool.marks}
    out |= {_CODES + name: t.index_select(0, index) for name, t in codes.items()}
    return out | {"keys": store.tail.keys, "values": store.tail.values}


def refill(store: LayerStore, found: Mapping[str, Tensor], form: Format | None) -> None:
    """Hold what :func:`flat` took from a store of the same heads, and nothing else.

    Args:
        found: on the store's device.
        form: how its full pages are written.

    Raises:
        CacheStateError: tensors are missing or do not match each other.
    """
    lengths = found["lengths"].cpu().numpy()
    planes = {name.removeprefix("plane."): t for name, t in found.items() if name.startswith("plane.")}
    positions = found["positions"].long()
    if form is None:
        store.replace(found["keys"], found["values"], positions, lengths, planes=planes)
        return
    keys, values = (found[name].new_zeros(len(positions), found[name].shape[-1]) for name in ("keys", "values"))
    store.replace(keys, values, positions, lengths, planes=planes, form=form)
    index, codes = _pages(store, lengths), {"keys": store.pool.keys, "values": store.pool.values, **store.pool.marks}
    if {_CODES + name for name in codes} != {name for name in found if name.startswith(_CODES)}:
        raise CacheStateError(f"what was saved is not in {form.name}.")
    for name, target in codes.items():
        source = found[_CODES + name]
        if source.dtype != target.dtype or source.shape[1:] != target.shape[1:]:
            shape = tuple(source.shape[1:])
            raise CacheStateError(f"what was saved is not in {form.name}: {name} of a page are {shape}.")
        if len(source) != len(index):
            raise CacheStateError(f"{name} of {len(source)} pages were saved, where the lengths need {len(index)}.")
        target.index_copy_(0, index, source)
    if found["keys"].shape[:2] != (lengths.size, store.page):
        raise CacheStateError("newest pages and heads differ in number.")
    store.tail = Tail(form, found["keys"].clone(), found["values"].clone())


def _pages(store: LayerStore, lengths: Lengths) -> Tensor:
    """The pages that hold entries, ordered by row."""
    needed = -(-lengths.reshape(-1) // store.page)
    listed = store.table[np.arange(store.table.shape[1]) < needed[:, None]]
    return on_device(listed, store.device)
