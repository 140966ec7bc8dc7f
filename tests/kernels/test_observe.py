"""What queries look at, against an attention matrix written out row by row."""

from __future__ import annotations

import pytest
import torch
from tests.views import eager_rows, layer_view, view_rows
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import LayerView

RAGGED = [[9, 14, 3], [14, 1, 6]]


def window(view: LayerView) -> Tensor:
    assert view.queries is not None
    assert view.query_positions is not None
    return kernels.window_attention(
        view.queries,
        view.keys,
        q_positions=view.query_positions,
        k_positions=view.positions,
        valid=view.valid,
        scale=view.scale,
    )


def columns(view: LayerView, block: int = 256) -> Tensor:
    """Column sums of the view's queries, with the log-sum-exp that attention would have returned."""
    assert view.queries is not None
    assert view.query_positions is not None
    keys, positions, valid = (x.repeat_interleave(view.group, 1) for x in (view.keys, view.positions, view.valid))
    logits = view.queries.double() @ keys.double().transpose(-1, -2) * view.scale
    sees = valid[:, :, None] & (positions[:, :, None] <= view.query_positions[:, None, :, None])
    return kernels.column_sums(
        view.queries,
        view.keys,
        q_positions=view.query_positions,
        k_positions=view.positions,
        valid=view.valid,
        scale=view.scale,
        lse=logits.masked_fill(~sees, -torch.inf).logsumexp(dim=-1).float(),
        block=block,
    )


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("seen", [14, 40])
def test_window_rows_are_causal_by_position_over_what_is_there(group: int, seen: int) -> None:
    view = layer_view(batch=2, heads=3, group=group, lengths=RAGGED, seen=seen, window=6, dim=16)
    torch.testing.assert_close(window(view).double(), view_rows(view), atol=1e-6, rtol=1e-5)


def test_a_window_longer_than_the_text_has_rows_of_zeros() -> None:
    view = layer_view(entries=5, window=9)
    rows = window(view)
    assert (rows[:, :, :, :4] == 0).all()
    torch.testing.assert_close(rows.double(), view_rows(view), atol=1e-6, rtol=1e-5)


def test_a_row_that_sees_no_kept_entry_is_zero_and_not_nan() -> None:
    view = layer_view(entries=4, seen=50, window=3)
    view.query_positions = view.positions.min() - torch.tensor([[3, 2, 1]])
    assert (window(view) == 0).all()
    assert (columns(view) == 0).all()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("entries", [1, 63, 65])
def test_columns_sum_to_the_number_of_queries_in_every_head(group: int, entries: int) -> None:
    """Observed attention: sum over j of plain column sums = T per head."""
    view = layer_view(heads=3, group=group, entries=entries, window=entries, dim=16)
    sums = columns(view)
    torch.testing.assert_close(sums.sum(dim=-1), torch.full((1, 3), float(entries)), atol=1e-4, rtol=1e-5)
    expected = view_rows(view).mean(dim=2).sum(dim=2)
    torch.testing.assert_close(sums.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 16, 33, 1000])
def test_column_sums_do_not_depend_on_the_block_size(block: int) -> None:
    view = layer_view(batch=2, heads=3, group=2, lengths=RAGGED, seen=33, window=33)
    assert view.query_positions is not None
    view.query_positions[1, :20] = -1  # a shorter sequence, packed to the right
    expected = view_rows(view).mean(dim=2).sum(dim=2)
    torch.testing.assert_close(columns(view, block).double(), expected, atol=1e-5, rtol=1e-5)


def test_queries_of_padding_add_nothing_to_any_column() -> None:
    view = layer_view(batch=2, entries=20, window=33)
    assert view.query_positions is not None
    view.query_positions[1, :25] = -1
    expected = view_rows(view).mean(dim=2).sum(dim=2)
    torch.testing.assert_close(columns(view).double(), expected, atol=1e-5, rtol=1e-5)


def test_column_sums_do_not_overflow_where_a_query_may_not_look() -> None:
    view = layer_view(entries=40, window=40)
    assert view.queries is not None
    view.keys[:, :, -1] *= 1e4  # to earlier queries the exponential of this logit would be infinite
    sums = columns(view)
    assert sums.isfinite().all()
    torch.testing.assert_close(sums.sum(dim=-1), torch.full((1, 2), 40.0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_one_step_attends_to_everything_stored(group: int) -> None:
    view = layer_view(batch=2, heads=3, group=group, lengths=RAGGED, dim=16)
    q = torch.randn(2, 3 * group, 1, 16)
    found = kernels.entry_attention(q, view.keys, valid=view.valid, scale=view.scale)
    rows = eager_rows(
        q,
        view.keys,
        q_positions=torch.full((2, 1), 10**6),
        k_positions=view.positions,
        lengths=view.lengths,
        scale=view.scale,
    )
    torch.testing.assert_close(found.double(), rows[:, :, :, 0].mean(dim=2), atol=1e-6, rtol=1e-5)
    assert (found[~view.valid] == 0).all()


def test_a_bias_counts_in_all_three_views() -> None:
    torch.manual_seed(5)
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    positions = torch.arange(40)[None]
    spread, valid = positions[:, None].expand(1, 2, 40), torch.ones(1, 2, 40, dtype=torch.bool)
    bias = torch.rand(1, 2, 40) * 3
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4 + bias.repeat_interleave(2, 1)[:, :, None]
    logits = logits.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf"))
    rows, lse = logits.softmax(-1), logits.logsumexp(-1)
    common = {"k_positions": spread, "valid": valid, "scale": 0.25, "bias": bias}
    window = kernels.window_attention(q, k, q_positions=positions, **common)
    torch.testing.assert_close(window.flatten(1, 2), rows)
    columns = kernels.column_sums(q, k, q_positions=positions, lse=lse, block=7, **common)
    torch.testing.assert_close(columns, rows.view(1, 2, 2, 40, 40).mean(2).sum(2))
    last = kernels.entry_attention(q[:, :, -1:], k, valid=valid, scale=0.25, bias=bias)
    torch.testing.assert_close(last, rows[:, :, -1].view(1, 2, 2, 40).mean(2))
