"""What is gathered while a model reads: the newest queries and moments of all, whatever the passes they came in."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvthrift.core import Rope
from kvthrift.runtime.observe import QueryStatistics, QueryWindow
from kvthrift.runtime.step import Columns

CPU = torch.device("cpu")
BATCH, HEADS, DIM, SIZE = 2, 3, 4, 5
ROPE = Rope(torch.tensor([1.0, 0.3]))
passes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def drawn(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, total, D]`` and a mask ``[B, total]``."""
    rng = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    queries = torch.randn(BATCH, HEADS, total, DIM, generator=rng)
    return queries, torch.rand(BATCH, total, generator=rng) < 0.7


def feed(part: QueryWindow | QueryStatistics, lengths: list[int], queries: Tensor, mask: Tensor) -> None:
    columns, stop = Columns(), 0
    for length in lengths:
        step = columns.step(BATCH, length, mask[:, : stop + length], CPU)
        packed = step.pack(queries[:, :, stop : stop + length])
        if isinstance(part, QueryWindow):
            part.see(packed, step)
        else:
            part.see(packed, step, ROPE)
        columns.advance(step)
        stop += length


def newest(part: QueryWindow, row: int) -> tuple[list[int], Tensor]:
    assert part.positions is not None
    assert part.queries is not None
    real = part.positions[row] >= 0
    return part.positions[row][real].tolist(), part.queries[row][:, real]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(passes, st.integers(0, 10**6), st.integers(0, 20))
def test_the_window_holds_the_newest_real_queries(lengths: list[int], seed: int, back: int) -> None:
    queries, mask = drawn(lengths, seed)
    window = QueryWindow(SIZE)
    feed(window, lengths, queries, mask)
    limits = (mask.sum(dim=1) - back).clamp(min=0)
    for forget in (False, True):
        if forget:
            window.rewind(limits)
        for b in range(BATCH):
            real = queries[b][:, mask[b]]
            count = real.shape[1]
            wanted = list(range(max(0, count - SIZE), count))
            if forget:
                wanted = [position for position in wanted if position < limits[b]]
            positions, held = newest(window, b)
            assert positions == wanted
            assert torch.equal(held, real[:, wanted])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(passes, st.integers(0, 10**6), st.integers(0, 4))
def test_moments_are_those_of_all_real_queries_behind_the_first(lengths: list[int], seed: int, after: int) -> None:
    plain, mask = drawn(lengths, seed)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    turned = ROPE.rotate(plain, places[:, None])
    statistics = QueryStatistics(after)
    feed(statistics, lengths, turned, mask)
    moments = statistics.moments
    assert moments is not None
    for b in range(BATCH):
        real = plain[b][:, mask[b]][:, after:]  # [H, N, D]
        assert moments.count[b] == real.shape[1]
        if real.shape[1]:
            torch.testing.assert_close(moments.mean[b], real.mean(dim=1), atol=1e-5, rtol=1e-4)
            spread = torch.stack([torch.cov(head.T, correction=0).reshape(DIM, DIM) for head in real])
            torch.testing.assert_close(moments.covariance[b], spread, atol=1e-4, rtol=1e-3)


def test_rows_are_chosen_and_forks_kept_apart() -> None:
    lengths = [6, 1]
    queries, mask = drawn(lengths, 3)
    window, statistics = QueryWindow(SIZE), QueryStatistics(0)
    feed(window, lengths, queries, mask)
    feed(statistics, lengths, queries, mask)
    fork, other = window.fork(), statistics.fork()
    rows = np.array([1, 0, 1])
    window.select(rows)
    statistics.select(rows)
    for row, origin in enumerate(rows):
        assert newest(window, row)[0] == newest(fork, origin)[0]
        assert torch.equal(newest(window, row)[1], newest(fork, origin)[1])
        assert statistics.moments is not None
        assert other.moments is not None
        assert torch.equal(statistics.moments.outer[row], other.moments.outer[origin])
    assert fork.positions is not None
    assert fork.positions.shape[0] == BATCH


def test_bytes_are_those_of_the_tensors() -> None:
    queries, mask = drawn([9], 1)
    window, statistics = QueryWindow(SIZE), QueryStatistics(0)
    assert window.bytes == statistics.bytes == 0
    feed(window, [9], queries, mask)
    feed(statistics, [9], queries, mask)
    assert window.bytes == BATCH * (HEADS * SIZE * DIM * 4 + SIZE * 8)
    assert statistics.bytes == BATCH * 4 * (1 + HEADS * DIM + HEADS * DIM * DIM)
    assert window.queries is not None
    assert window.queries.untyped_storage().nbytes() == BATCH * HEADS * SIZE * DIM * 4  # no view of the whole pass
