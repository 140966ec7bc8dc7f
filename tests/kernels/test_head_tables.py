"""Tables of unequal heads against the same written out; Triton's kernel, interpreted on a CPU, against its twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvthrift.kernels.head_tables import Kept, _fill, head_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, SIZE, STEP = 3, 4, 5  # blocks lie five pages apart, of which three are ours
FOREIGN = -7


def case(lengths: list[int], kept: list[list[int]], full: list[int], width: int = 12) -> tuple[Kept, Tensor, Tensor]:
    """Requests with so many tokens, pages that each head keeps, and blocks that those stand for; blocks of each."""
    slots = len(lengths) + 2
    pages = torch.full((slots, 24), FOREIGN, dtype=torch.int32)
    starts, covered = torch.zeros(slots, HEADS + 1, dtype=torch.int32), torch.zeros(slots, dtype=torch.int32)
    for request, (counts, blocks) in enumerate(zip(kept, full, strict=True)):
        pages[slots - 1 - request, : sum(counts)] = torch.randint(0, 900, (sum(counts),), dtype=torch.int32)
        starts[slots - 1 - request] = torch.tensor([0, *counts]).cumsum(0)
        covered[slots - 1 - request] = blocks
    blocks = torch.randint(1, 90, (len(lengths), width), dtype=torch.int32)
    found = Kept(pages.to(DEVICE), starts.to(DEVICE), covered.to(DEVICE), SIZE, STEP)
    return found, torch.arange(slots - 1, 1, -1, dtype=torch.int32, device=DEVICE), blocks.to(DEVICE)


def written_out(kept: Kept, slots: Tensor, lengths: list[int], blocks: Tensor) -> list[list[int]]:
    """The pages of every head of every request, and nothing else."""
    out = []
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths, strict=True)):
        full = int(kept.full[slot])
        behind = blocks[row, full : -(-length // SIZE)].tolist() if length else []
        for head in range(HEADS):
            first, last = kept.starts[slot, head : head + 2].tolist()
            own = kept.pages[slot, first:last].tolist() if length else []
            out.append(own + [block * STEP + head for block in behind])
    return out


CASES = [
    ([1], [[0, 0, 0]], [0]),
    ([41, 3, 0, 20], [[5, 1, 3], [0, 0, 0], [2, 2, 2], [2, 2, 2]], [9, 0, 5, 5]),
    ([40, 44, 37], [[8, 1, 1], [1, 9, 1], [3, 3, 3]], [10, 10, 9]),
]


@pytest.mark.parametrize(("lengths", "kept", "full"), CASES)
def test_every_head_has_what_it_keeps_and_what_came_since(
    lengths: list[int], kept: list[list[int]], full: list[int]
) -> None:
    store, slots, blocks = case(lengths, kept, full)
    rows = len(lengths) * HEADS
    tables = torch.full((rows + 2, 12), FOREIGN, dtype=torch.int32, device=DEVICE)
    sizes = torch.full((rows + 2,), FOREIGN, dtype=torch.int32, device=DEVICE)
    head_tables(store, slots, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), blocks, tables, sizes)
    want = written_out(store, slots, lengths, blocks)
    behind = [0 if not n else n - full[r] * SIZE for r, n in enumerate(lengths)]
    counts = [[0] * HEADS if not n else kept[r] for r, n in enumerate(lengths)]
    assert sizes[:rows].tolist() == [c * SIZE + behind[r] for r in range(len(lengths)) for c in counts[r]]
    for line, pages in zip(tables.tolist(), want, strict=False):
        assert line == pages + [FOREIGN] * (12 - len(pages))  # nothing beyond is touched
    assert tables[rows:].eq(FOREIGN).all()
    assert sizes[rows:].eq(FOREIGN).all()


def compare() -> None:
    """Triton's kernel against its twin, with tables wider than one turn of its loop."""
    from kvthrift.kernels.triton.head_tables import fill

    torch.manual_seed(1)
    for lengths, kept, full in [*CASES, ([2100, 1500], [[300, 5, 1], [1, 1, 280]], [510, 370])]:
        room = sum(max(kept, key=sum))
        store, slots, blocks = case(lengths, [[0] * HEADS for _ in lengths], full, width=620)
        store.starts[slots.long()] = torch.tensor([[0, *c] for c in kept], device=DEVICE).cumsum(1).int()
        pages = torch.randint(0, 900, (store.pages.shape[0], max(room, 1)), dtype=torch.int32, device=DEVICE)
        store = Kept(pages, store.starts, store.full, SIZE, STEP)
        rows = len(lengths) * HEADS
        results = []
        for function in (fill, _fill):
            tables = torch.full((rows, 620), FOREIGN, dtype=torch.int32, device=DEVICE)
            sizes = torch.full((rows,), FOREIGN, dtype=torch.int32, device=DEVICE)
            function(store, slots, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), blocks, tables, sizes)
            results.append((tables, sizes))
        (tables, sizes), (want, want_sizes) = results
        assert torch.equal(sizes, want_sizes)
        assert torch.equal(tables, want)


def test_the_kernel_and_its_twin_agree() -> None:
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        compare()
        return
    words = [sys.executable, "-c", "from tests.kernels.test_head_tables import compare; compare()"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
