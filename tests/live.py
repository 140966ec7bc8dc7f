"""Every tensor that something keeps alive, found by walking its attributes: what reported bytes are checked by."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn


def live_tensors(*roots: Any) -> list[Tensor]:
    """Tensors reachable through attributes, lists, tuples, sets and dicts; modules and configs are not entered."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, np.ndarray, nn.Module, type)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
            todo += vars(item).values()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return found


def live_bytes(*roots: Any) -> int:
    """Bytes of the distinct storages behind them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live_tensors(*roots)}
    return sum(storages.values())
