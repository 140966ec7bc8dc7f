"""What a store costs: after a cut it holds the entries that stay, rounded up to pages, and next to nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError
from kvthrift.store import LayerStore, settle

PAGE = 64
BATCH, HEADS, DIM = 2, 4, 16
ENTRY_BYTES = 2 * DIM * 4 + 4  # key, value, position


def filled(length: int, *, planes: tuple[str, ...] = ()) -> LayerStore:
    shape = LayerShape(HEADS, HEADS, DIM, DIM)
    store = LayerStore(shape, BATCH, torch.float32, torch.device("cpu"), page=PAGE, planes=planes)
    block = torch.randn(BATCH, HEADS, length, DIM)
    store.append(block, block, torch.arange(length).expand(BATCH, length))
    return store


def cut(store: LayerStore, lengths: np.ndarray, *, planes: tuple[str, ...] = ()) -> None:
    count = int(lengths.sum())
    flat = torch.randn(count, DIM)
    marks = {name: torch.zeros(count) for name in planes}
    store.replace(flat, flat, torch.zeros(count, dtype=torch.long), lengths, planes=marks)


RAGGED = {
    "uniform": [[256] * HEADS] * BATCH,
    "page and one": [[65] * HEADS] * BATCH,
    "one rich head": [[2000, 1, 1, 1], [1, 1, 1, 1]],
    "staircase": [[1, 63, 64, 65], [500, 900, 3, 1024]],
    "an empty head": [[0, 700, 700, 700], [0, 0, 0, 64]],
    "long": [[40 * PAGE] * HEADS] * BATCH,
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("planes", [(), ("bias",)])
def test_a_cut_store_holds_its_entries_in_whole_pages(name: str, planes: tuple[str, ...]) -> None:
    lengths = np.array(RAGGED[name], dtype=np.int64)
    store = filled(64 * PAGE)
    before = store.bytes
    cut(store, lengths, planes=planes)
    in_pages = int((-(-lengths // PAGE)).sum()) * PAGE
    wanted = in_pages * (ENTRY_BYTES + 4 * len(planes))
    assert wanted <= store.bytes <= 1.01 * wanted
    assert store.bytes < before
    store.check_integrity()


@pytest.mark.parametrize("name", RAGGED)
def test_lengths_that_come_late_cost_a_page_a_head_until_they_are_there(name: str) -> None:
    lengths = np.array(RAGGED[name], dtype=np.int64)
    store, told = filled(PAGE), filled(PAGE)
    keys, at = torch.randn(int(lengths.sum()), DIM), torch.arange(int(lengths.sum()))
    told.replace(keys, keys, at, lengths)
    store.replace(keys, keys, at, torch.from_numpy(lengths))
    before = store.bytes  # asks for nothing
    assert store.late is not None
    assert before <= told.bytes + BATCH * HEADS * (PAGE * ENTRY_BYTES + 8)
    settle([store])
    assert store.bytes == told.bytes
    assert store.late is None
    assert torch.equal(store.read().keys[store.valid()], keys)
    assert torch.equal(store.positions()[store.valid()], at)
    store.check_integrity()


def test_late_lengths_that_do_not_add_up_are_refused() -> None:
    store, keys = filled(PAGE), torch.randn(10, DIM)
    store.replace(keys, keys, torch.arange(10), torch.full((BATCH, HEADS), 1))
    with pytest.raises(CacheStateError, match="brought 10 entries"):
        settle([store])


def test_decoding_behind_a_cut_costs_a_page_a_head_now_and_then() -> None:
    store = filled(1024)
    cut(store, np.full((BATCH, HEADS), PAGE))
    one = torch.randn(BATCH, HEADS, 1, DIM)
    for step in range(PAGE):
        store.append(one, one, torch.full((BATCH, 1), 1024 + step))
    assert store.bytes <= 1.05 * BATCH * HEADS * 2 * PAGE * ENTRY_BYTES


def test_growing_token_by_token_leaves_a_margin_of_a_few_percent() -> None:
    store = filled(40 * PAGE)
    one = torch.randn(BATCH, HEADS, 1, DIM)
    for step in range(3 * PAGE):
        store.append(one, one, torch.full((BATCH, 1), 40 * PAGE + step))
    assert store.bytes <= 1.05 * store.entries * ENTRY_BYTES


def test_forks_share_pages_until_one_writes() -> None:
    store = filled(10 * PAGE + 1)
    before = store.bytes
    forks = [store.fork() for _ in range(3)]
    assert {fork.pool for fork in forks} == {store.pool}
    assert store.pool.total * PAGE * ENTRY_BYTES <= before  # not a page more
    one = torch.randn(BATCH, HEADS, 1, DIM)
    forks[0].append(one, one, torch.full((BATCH, 1), 10 * PAGE + 1))
    assert store.pool.total - store.pool.free == BATCH * HEADS * 12  # one tail each, copied
    assert store.longest == 10 * PAGE + 1


def test_a_dropped_fork_gives_its_pages_back() -> None:
    store = filled(PAGE)
    fork = store.fork()
    block = torch.randn(BATCH, HEADS, 5 * PAGE, DIM)
    fork.append(block, block, torch.arange(5 * PAGE).expand(BATCH, -1))
    assert store.pool.free < store.pool.total - BATCH * HEADS
    del fork
    assert store.pool.free == store.pool.total - BATCH * HEADS
    store.check_integrity()


def test_a_plane_that_is_forgotten_frees_its_bytes() -> None:
    store = filled(PAGE, planes=("columns",))
    before = store.bytes
    store.forget(("columns",))
    assert before - store.bytes == BATCH * HEADS * PAGE * 4
