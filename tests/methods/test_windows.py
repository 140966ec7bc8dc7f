"""SnapKV's, PyramidKV's and ChunkKV's scores as their papers write them: they differ in the order of their steps."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, view_rows
from torch import Tensor
from torch.nn import functional as F

from kvthrift import Recipe, method

W, T, PAST = 8, 60, 52


def rows() -> Tensor:
    """The window's attention to what comes before it: ``[H, G, W, PAST]``."""
    return view_rows(layer_view(heads=2, group=3, entries=T, window=W, dim=16))[0, ..., :PAST]


def score(recipe: Recipe) -> Tensor:
    found = recipe.scorer.score(layer_view(heads=2, group=3, entries=T, window=W, dim=16))
    assert (found[..., PAST:] == 0).all()  # the window is not scored: it stays
    return found[0, :, :PAST].double()


def check(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_snapkv_pools_each_query_head_and_then_joins_the_group() -> None:
    pooled = F.max_pool1d(rows().mean(dim=2), 7, 1, 3)
    check(score(method("snapkv", window=W)), pooled.mean(dim=1))
    check(score(method("snapkv", window=W, group="max")), pooled.amax(dim=1))
    check(score(method("snapkv", window=W, group="sum")), pooled.sum(dim=1))
    averaged = F.avg_pool1d(rows().mean(dim=2), 5, 1, 2)
    check(score(method("snapkv", window=W, pool="avg", kernel=5)), averaged.mean(dim=1))


@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_pyramidkv_joins_the_group_and_then_pools(group: str) -> None:
    summed = rows().sum(dim=2)
    joined = {"mean": summed.mean(dim=1), "max": summed.amax(dim=1), "sum": summed.sum(dim=1)}[group]
    check(score(method("pyramidkv", group=group)), F.max_pool1d(joined, 7, 1, 3))


def test_chunkkv_sums_over_the_window_and_pools_nothing() -> None:
    check(score(method("chunkkv")), rows().sum(dim=2).mean(dim=1))
