"""The pool's books, and that they notice when something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError
from kvthrift.store import LayerStore, PagePool


def pool(pages: int = 0) -> PagePool:
    made = PagePool(4, 3, 2, torch.float32, torch.device("cpu"), ("bias",))
    made.take(pages)
    return made


def store(length: int = 6) -> LayerStore:
    made = LayerStore(LayerShape(2, 2, 3, 2), 1, torch.float32, torch.device("cpu"), page=4)
    made.append(torch.ones(1, 2, length, 3), torch.ones(1, 2, length, 2), torch.arange(length)[None])
    return made


def test_pages_handed_out_are_zero_even_where_memory_is_poisoned() -> None:
    made = pool()
    made.resize(3)
    assert made.keys.isnan().all()  # the fixture works: fresh memory is not zero by luck
    pages = made.take(2)
    for tensor in made.tensors():
        assert not tensor[pages].any()


def test_free_pages_serve_again_before_the_pool_grows() -> None:
    made = pool(4)
    made.release(np.array([1, 2]))
    np.testing.assert_array_equal(made.take(2), [1, 2])
    assert made.total == 4
    made.take(1)
    assert made.total == 5


def test_a_page_has_as_many_owners_as_tables_list_it() -> None:
    made = pool(2)
    made.share(np.array([0, 0]))
    for _ in range(3):
        assert made.free == 0
        made.release(np.array([0]))
    assert made.free == 1


def test_releasing_what_nobody_owns_is_refused() -> None:
    made = pool(1)
    made.release(np.array([0]))
    with pytest.raises(CacheStateError, match="more often"):
        made.release(np.array([0]))


def test_a_pool_does_not_shrink_below_owned_pages() -> None:
    made = pool(3)
    made.release(np.array([0, 2]))
    with pytest.raises(CacheStateError, match="still owned"):
        made.resize(1)
    made.trim()
    assert made.total == 2


def test_a_lost_page_is_noticed() -> None:
    made = store()
    made.table[0, -1] = -1
    made.lengths[0, 0] = 4
    with pytest.raises(CacheStateError, match="pages owned"):
        made.check_integrity()


def test_a_page_in_two_tables_is_noticed() -> None:
    made = store()
    made.table[1] = made.table[0]
    with pytest.raises(CacheStateError, match="pages owned"):
        made.check_integrity()


def test_more_entries_than_room_are_noticed() -> None:
    made = store()
    made.lengths[0, 1] = 9
    with pytest.raises(CacheStateError, match="room"):
        made.check_integrity()


def test_a_fork_that_is_not_named_is_noticed() -> None:
    made = store()
    fork = made.fork()
    made.check_integrity(fork)
    with pytest.raises(CacheStateError, match="pages owned"):
        made.check_integrity()
