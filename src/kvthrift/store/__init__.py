"""Ragged, paged, per-head storage of one layer's entries, with the memory really freed.

Knows nothing of recipes, queries or models: it is handed keys, values and positions, and gives them back.
"""

from kvthrift.store.fresh import on_device
from kvthrift.store.layer import LayerStore
from kvthrift.store.pool import PagePool
from kvthrift.store.read import Held
from kvthrift.store.table import settle
from kvthrift.store.tail import Tail, entry_and_head_bytes

__all__ = ["Held", "LayerStore", "PagePool", "Tail", "entry_and_head_bytes", "on_device", "settle"]
