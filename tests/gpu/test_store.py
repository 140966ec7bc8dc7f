"""The store on CUDA against the same store on the CPU: the same operations leave the same entries, bit for bit."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch

from kvthrift.core import LayerShape
from kvthrift.store import LayerStore

pytestmark = pytest.mark.gpu

HEADS, DIM, STEPS, MOST_STORES = 3, 16, 60, 4


class Twins:
    """The same stores on both devices, driven by the same random numbers."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.draw = random.Random(seed)
        self.dtype = dtype
        shape = LayerShape(HEADS, 2 * HEADS, DIM, DIM)
        page = self.draw.choice((8, 64))
        self.pairs = [
            tuple(
                LayerStore(shape, 2, dtype, torch.device(d), page=page, planes=("bias", "columns"))
                for d in ("cuda", "cpu")
            )
        ]
        self.seen = [np.zeros(2, dtype=np.int64)]

    def step(self) -> None:
        which = self.draw.randrange(len(self.pairs))
        getattr(self, self.draw.choice(("append", "append", "append", "replace", "rewind", "select", "fork", "write")))(
            which
        )

    def append(self, which: int) -> None:
        batch, count = self.pairs[which][1].batch, self.draw.choice((1, 1, 5, 64, 150))
        counts = np.array([self.draw.randrange(count + 1) for _ in range(batch)]) if self.draw.random() < 0.3 else None
        k, v = (torch.randn(batch, HEADS, count, DIM).to(self.dtype) for _ in range(2))
        planes = {"bias": torch.rand(batch, HEADS, count)} if self.draw.random() < 0.5 else None
        positions = torch.from_numpy(self.seen[which])[:, None] + torch.arange(count)
        for store in self.pairs[which]:
            on = store.device
            given = None if planes is None else {name: t.to(on) for name, t in planes.items()}
            store.append(k.to(on), v.to(on), positions.to(on), counts=counts, planes=given)
        self.seen[which] = self.seen[which] + (count if counts is None else counts)

    def replace(self, which: int) -> None:
        shares = torch.rand(self.pairs[which][1].batch, HEADS, 1) if self.draw.random() < 0.7 else torch.tensor(0.5)
        keep = (torch.rand(self.pairs[which][1].valid().shape) < shares) & self.pairs[which][1].valid()
        lengths = keep.sum(dim=-1).numpy()
        for store in self.pairs[which]:
            chosen, view = keep.to(store.device), store.read()
            planes = {name: store.plane(name)[chosen] for name in store.pool.planes}
            store.replace(view.keys[chosen], view.values[chosen], store.positions()[chosen], lengths, planes=planes)

    def rewind(self, which: int) -> None:
        self.seen[which] = np.array([max(0, n - self.draw.randrange(80)) for n in self.seen[which]])
        for store in self.pairs[which]:
            store.rewind(torch.from_numpy(self.seen[which]))

    def select(self, which: int) -> None:
        batch = self.pairs[which][1].batch
        rows = np.array([self.draw.randrange(batch) for _ in range(self.draw.randint(1, 3))])
        for store in self.pairs[which]:
            store.select(rows)
        self.seen[which] = self.seen[which][rows]

    def fork(self, which: int) -> None:
        if len(self.pairs) == MOST_STORES:
            self.pairs.pop(which)
            self.seen.pop(which)
            gc.collect(0)
            return
        self.pairs.append(tuple(store.fork() for store in self.pairs[which]))
        self.seen.append(self.seen[which].copy())

    def write(self, which: int) -> None:
        values = torch.rand(self.pairs[which][1].valid().shape)
        for store in self.pairs[which]:
            if store.longest:
                store.write("columns", values.to(store.device))

    def check(self) -> None:
        for ours, twin in self.pairs:
            np.testing.assert_array_equal(ours.lengths, twin.lengths)
            valid, view, other = twin.valid(), ours.read(), twin.read()
            assert torch.equal(ours.valid().cpu(), valid)
            assert view.keys.isfinite().all()
            assert view.values.isfinite().all()
            for got, expected in (
                (view.keys, other.keys),
                (view.values, other.values),
                (ours.positions(), twin.positions()),
                *((ours.plane(name), twin.plane(name)) for name in twin.pool.planes),
            ):
                assert torch.equal(got.cpu()[valid], expected[valid])
            assert (view.bias is None) == (other.bias is None)
            if view.bias is not None and other.bias is not None:
                assert torch.equal(view.bias.cpu()[valid], other.bias[valid])
                assert (view.bias.cpu()[~valid] == -torch.inf).all()
            assert ours.pool.bytes == twin.pool.bytes  # lengths are on the device once something was added there
            assert ours.table.shape == twin.table.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_operations_leave_the_same_entries(seed: int, dtype: torch.dtype) -> None:
    twins = Twins(seed, dtype)
    for _ in range(STEPS):
        twins.step()
        twins.check()
