"""Where the next entries go, as the device finds it and as the host does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvthrift.core import LayerShape
from kvthrift.store import LayerStore


@pytest.mark.parametrize("counts", [(0, 0), (1, 3), (4, 4), (5, 8), (7, 12)])
def test_the_device_finds_the_slots_that_the_host_finds(counts: tuple[int, int]) -> None:
    store = LayerStore(LayerShape(2, 2, 8, 8), 1, torch.float32, torch.device("cpu"), page=4, planes=("sums",))
    total = sum(counts)
    if total:
        x = torch.randn(total, 8)
        positions = torch.cat([torch.arange(n) for n in counts])
        store.replace(x, x, positions, np.array([counts]), planes={"sums": torch.ones(total)})
    store.make_room(1)
    wanted = store._slots(np.arange(2), np.array(counts))
    assert torch.equal(store.next_slots(), wanted)
    assert len(set(wanted.tolist())) == 2
