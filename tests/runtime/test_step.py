"""Which columns are real tokens: packing undone is nothing done, and history is what the masks said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvthrift.errors import MaskError
from kvthrift.runtime.step import Columns, Step

CPU = torch.device("cpu")


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """A mask ``[B, T]`` with padding anywhere."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).view(rows, columns)


def step_of(mask: Tensor) -> Step:
    return Columns().step(mask.shape[0], mask.shape[1], mask, CPU)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(masks())
def test_packed_rows_begin_with_their_real_tokens_in_order(mask: Tensor) -> None:
    step = step_of(mask)
    columns = torch.arange(mask.shape[1]).float()
    x = columns.expand(mask.shape[0], 2, -1)[..., None].clone()
    packed = step.pack(x)
    for b, row in enumerate(mask):
        real = columns[row]
        assert torch.equal(packed[b, 1, : len(real), 0], real)
        assert step.counts[b] == len(real)
        assert step.real[b].sum() == len(real)
        assert step.positions[b, : len(real)].tolist() == list(range(len(real)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(masks())
def test_unpacking_undoes_packing_and_leaves_zeros_for_padding(mask: Tensor) -> None:
    step = step_of(mask)
    x = torch.rand(mask.shape[0], 2, mask.shape[1], 3) + 1
    back = step.unpack(step.pack(x))
    assert torch.equal(back, x * mask[:, None, :, None])
    assert step.padded == (not mask.all())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 10**6), st.booleans())
def test_history_is_what_the_masks_said(lengths: list[int], seed: int, padded: bool) -> None:
    """Passes of any lengths, then back to any of them, then on with other columns."""
    rng = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    whole = torch.rand(2, total, generator=rng) < (0.6 if padded else 2.0)
    columns, stop = Columns(), 0
    for length in lengths:
        step = columns.step(2, length, whole[:, : stop + length], CPU)
        np.testing.assert_array_equal(step.start, whole[:, :stop].sum(dim=1))
        columns.advance(step)
        stop += length
        np.testing.assert_array_equal(columns.seen(2), whole[:, :stop].sum(dim=1))
    fork = columns.fork()
    back = int(torch.randint(0, total + 1, (1,), generator=rng))
    columns.crop(back)
    columns.select(np.array([1, 1, 0]))
    np.testing.assert_array_equal(columns.seen(3), whole[[1, 1, 0], :back].sum(dim=1))
    grown = torch.cat((whole[[1, 1, 0], :back], torch.ones(3, 1, dtype=torch.bool)), dim=1)
    columns.advance(columns.step(3, 1, grown, CPU))
    np.testing.assert_array_equal(columns.seen(3), grown.sum(dim=1))
    np.testing.assert_array_equal(fork.seen(2), whole.sum(dim=1))


def test_a_pass_without_a_mask_is_all_real() -> None:
    columns = Columns()
    step = columns.step(2, 4, None, CPU)
    assert not step.padded
    assert step.positions.tolist() == [[0, 1, 2, 3]] * 2
    columns.advance(step)
    assert columns.length == 4
    assert not columns.padded


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (None, "without an attention mask"),
        (torch.ones(2, 5).bool(), "says otherwise"),
        (torch.ones(2, 3).bool(), r"shape \(2, 3\)"),
        (torch.ones(1, 5).bool(), r"shape \(1, 5\)"),
    ],
)
def test_masks_that_contradict_what_was_read_are_refused(mask: Tensor | None, why: str) -> None:
    columns = Columns()
    columns.advance(columns.step(2, 4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool(), CPU))
    with pytest.raises(MaskError, match=why):
        columns.step(2, 1, mask, CPU)
    assert columns.length == 4
