"""What a cache holds and where its heads look, as plain numbers.

The one place of an evaluation that looks inside a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kvthrift.core import Signals
from kvthrift.eval.metrics.cost import Held
from kvthrift.eval.metrics.physics import Ints
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.runtime.received import plane_names

NOTHING = torch.empty(0)
NEVER = 1 << 40  # decoded tokens after which a cache that does not compress while decoding would


def positions(cache: Cache) -> list[list[Ints]]:
    """True positions that the first sequence holds, by layer and head, of the layers kvthrift keeps."""
    out: list[list[Ints]] = []
    for layer in cache.state.layers:
        if layer.store is not None:
            table, lengths = layer.store.positions()[0].cpu().numpy(), layer.store.lengths[0]
            out.append([table[head, :count] for head, count in enumerate(lengths)])
    return out


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tokens a cache of one sequence holds.

    Attributes:
        layers: the model's own numbers of the L layers kvthrift keeps.
        lengths: ``[L][H]`` entries held.
        kept: ``[L, H, T]``, whether that head holds that token's entry. Where layers differ in heads, H is the most
            of any, and the heads a layer lacks hold nothing.
    """

    layers: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    kept: NDArray[np.bool_]


def layout(cache: Cache, length: int) -> Layout:
    """Which of the first ``length`` tokens a cache holds; right after compression these are all that it holds."""
    where = positions(cache)
    kept = np.zeros((len(where), max(map(len, where), default=0), length), dtype=np.bool_)
    for layer, heads in enumerate(where):
        for head, found in enumerate(heads):
            kept[layer, head, found[found < length]] = True
    numbers = tuple(layer.number for layer in cache.state.layers if layer.store is not None)
    return Layout(numbers, tuple(tuple(map(int, row)) for row in kept.sum(axis=-1)), kept)


def held(cache: Cache) -> Held:
    """What a cache of one sequence holds; nothing of what it shares with others only for their sake."""
    report = cache.report()
    payload, metadata = _foreign(cache)
    return Held(
        report.entries,
        report.full_entries,
        report.bytes - payload - metadata,
        report.metadata_bytes - metadata,
        report.full_bytes,
        _read_bytes(cache),
    )


def _foreign(cache: Cache) -> tuple[int, int]:
    """Bytes of keys and values, and others, that are there for others: pages of forks, and what the recipe ignores."""
    needs, payload, metadata = cache.recipe.needs, 0, 0
    for layer in cache.state.layers:
        if layer.store is None:
            continue
        pool, table = layer.store.pool, layer.store.table
        wanted = (*plane_names(needs), "bias")
        planes = sum(plane.nbytes for name, plane in pool.planes.items() if name not in wanted)
        rope = (
            NOTHING if layer.rope is None or not layer.owns_rope or needs.rope or needs.moments else layer.rope.inv_freq
        )
        metadata += planes + rope.nbytes
        if pool.stores > 1:
            pages = pool.total - len(np.unique(table[table >= 0]))
            inside = pool.keys.nbytes + pool.values.nbytes
            payload += inside * pages // max(pool.total, 1)
            metadata += (pool.bytes - planes - inside) * pages // max(pool.total, 1)
    return payload, metadata


def _read_bytes(cache: Cache) -> int:
    """Keys and values, and what biases them, that a decode step attends to."""
    ours = {layer.number for layer in cache.state.layers}
    total = sum(row.bytes for row in cache.report().layers if row.layer not in ours)
    for layer in cache.state.layers:
        store = layer.store
        if store is not None:
            total += store.read_bytes + store.entries * (4 if "bias" in store.pool.planes else 0)
    return total


@contextmanager
def watching(cache: Cache) -> Iterator[None]:
    """Keep the queries of the decode steps inside, for :func:`peaks`; the cache is as before afterwards."""
    state = cache.state
    observes, recipe = state.observes, state.recipe
    windows = [layer.window for layer in state.layers]
    if recipe.trigger.every is None:
        state.observes = Signals(window=1)
        state.recipe = recipe.with_options(trigger=replace(recipe.trigger, every=NEVER))
    else:
        state.observes = observes | Signals(window=1)
    try:
        yield
    finally:
        state.observes, state.recipe = observes, recipe
        for layer, window in zip(state.layers, windows, strict=True):
            if not observes.window or recipe.trigger.every is None:
                layer.window = window


def peaks(cache: Cache) -> list[Ints]:
    """The position that each query head of the newest token looks at most: ``[HG]`` a compressed layer.

    Must be called inside :func:`watching`, behind a decode step.
    """
    out: list[Ints] = []
    for layer in cache.state.layers:
        window, store = layer.window, layer.store
        if layer.whole or store is None or window is None or window.queries is None:
            continue
        view = store.read()
        query = window.queries[0, :, -1].float().view(store.shape.kv_heads, -1, store.shape.key_dim)  # [H, G, D]
        logits = query @ view.keys[0].float().transpose(-1, -2) * layer.scale  # [H, G, T]
        if view.bias is not None:
            logits = logits + view.bias[0][:, None]
        places = store.positions()[0].gather(1, logits.argmax(dim=-1))  # [H, G]
        out.append(places.flatten().cpu().numpy().astype(np.int64))
    return out


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
