"""Reads a cache's report off its live tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvthrift.runtime import CacheReport, LayerReport
from kvthrift.runtime.layer import LayerCache

if TYPE_CHECKING:
    from kvthrift.integrations.transformers.cache import Cache


def cache_report(cache: Cache) -> CacheReport:
    """What ``cache`` holds; layers of transformers' own are counted and named."""
    state = cache.state
    ours = {layer.number: layer for layer in state.layers}
    rows = [
        _row(number, ours[number]) if number in ours else _stock_row(number, layer)
        for number, layer in enumerate(cache.layers)
    ]
    batch = max(cache.batch_size, 0)
    seen = state.columns.seen(batch)
    entries = full = full_bytes = payload = 0
    for layer in state.layers:
        store = layer.store
        if store is None:
            continue
        size = (store.shape.key_dim + store.shape.value_dim) * store.dtype.itemsize
        count = int(seen.sum()) * store.shape.kv_heads
        full_bytes += count * size
        payload += store.payload
        if not layer.whole:
            entries, full = entries + store.entries, full + count
    stock = sum(row.bytes for number, row in enumerate(rows) if number not in ours)
    held = state.held + stock
    return CacheReport(
        recipe=str(cache.recipe),
        tokens=tuple(int(n) for n in seen),
        entries=entries,
        full_entries=full,
        bytes=held,
        metadata_bytes=state.held - payload,
        full_bytes=full_bytes + stock,
        peak_bytes=max(state.meter.peak, state.held) + stock,
        compressions=state.meter.compressions,
        compression_seconds=state.meter.seconds,
        layers=tuple(rows),
    )


def _row(number: int, layer: LayerCache) -> LayerReport:
    form = None if layer.store is None else layer.store.form
    written = "" if form is None else f"in {form.name}, but for each head's newest page"
    note = "left whole: the recipe skips it" if layer.whole else written
    if layer.store is None or not layer.store.lengths.size:
        return LayerReport(number, 0, 0, 0.0, 0, 0, note)
    lengths = layer.store.lengths
    return LayerReport(
        number,
        lengths.shape[1],
        int(lengths.min()),
        float(lengths.mean()),
        int(lengths.max()),
        layer.bytes,
        note,
    )


def _stock_row(number: int, layer: Any) -> LayerReport:
    tensors = [t for t in vars(layer).values() if isinstance(t, Tensor)]
    for value in vars(layer).values():
        if isinstance(value, dict):
            tensors += [t for t in value.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}  # a view keeps all of it
    held = sum(storage.nbytes() for storage in storages.values())
    keys = getattr(layer, "keys", None)
    count, heads = (keys.shape[-2], keys.shape[1]) if isinstance(keys, Tensor) and keys.ndim == 4 else (0, 0)
    window = getattr(layer, "sliding_window", None)
    why = f"sliding window of {window}" if window else type(layer).__name__
    return LayerReport(number, heads, count, float(count), count, held, f"left whole: {why}, not full attention")
