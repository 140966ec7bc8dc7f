"""Forks in corners where sharing begins or ends without either side noticing."""

from __future__ import annotations

import torch

from kvthrift.core import LayerShape
from kvthrift.store import LayerStore

PAGE = 4


def store(length: int, *, heads: int = 1, planes: tuple[str, ...] = ()) -> LayerStore:
    shape = LayerShape(heads, heads, 1, 1)
    made = LayerStore(shape, 1, torch.float32, torch.device("cpu"), page=PAGE, planes=planes)
    append(made, length, 0.0)
    return made


def append(made: LayerStore, count: int, value: float) -> None:
    block = torch.full((1, made.shape.kv_heads, count, 1), value)
    made.append(block, block, made.longest + torch.arange(count)[None])


def contents(made: LayerStore, head: int = 0) -> list[float]:
    return made.read().keys[0, head, :, 0].tolist()


def test_an_emptied_fork_may_grow_again_in_the_same_pool() -> None:
    """One head's pages lie in order again as soon as the fork has none; they are still not alone."""
    first = store(PAGE)
    second = first.fork()
    second.rewind(torch.tensor([0]))
    append(first, PAGE, 1.0)
    append(second, PAGE - 1, 2.0)
    append(first, 1, 3.0)
    append(second, 1, 4.0)
    assert contents(first) == [0.0] * 4 + [1.0] * 4 + [3.0]
    assert contents(second) == [2.0] * 3 + [4.0]
    first.check_integrity(second)


def test_pages_in_reserve_are_shared_too_and_copied_before_a_long_write() -> None:
    """Going back leaves whole pages behind the last entry; a fork shares them all."""
    first = store(6 * PAGE, heads=2)
    first.rewind(torch.tensor([3]))
    second = first.fork()
    append(first, 3 * PAGE, 1.0)
    append(second, 3 * PAGE, 2.0)
    for head in range(2):
        assert contents(first, head) == [0.0] * 3 + [1.0] * 12
        assert contents(second, head) == [0.0] * 3 + [2.0] * 12
    first.check_integrity(second)


def test_a_plane_written_on_one_side_stays_there() -> None:
    first = store(PAGE + 1, planes=("columns",))
    second = first.fork()
    second.write("columns", torch.ones(1, 1, PAGE + 1))
    assert first.plane("columns").sum() == 0
    assert second.plane("columns").sum() == PAGE + 1
    first.check_integrity(second)


def test_the_last_of_several_forks_owns_everything() -> None:
    last = store(PAGE + 2)
    for value in (1.0, 2.0, 3.0):
        fork = last.fork()
        append(fork, 3, value)
        last = fork
        del fork
    assert contents(last) == [0.0] * 6 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    last.check_integrity()
    assert last.pool.stores == 1


def test_a_store_of_no_entries_may_be_replaced_by_none() -> None:
    empty = store(3)
    nothing = torch.zeros(0, 1)
    empty.replace(nothing, nothing, torch.zeros(0, dtype=torch.long), empty.lengths * 0)
    assert empty.longest == 0
    append(empty, 2, 5.0)
    assert contents(empty) == [5.0, 5.0]
