"""Observation windows against attention written out, pooled and reduced by hand."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, view_rows
from torch import Tensor

from kvthrift import OptionError
from kvthrift.core import LayerView
from kvthrift.score import LastQuery, WindowAttention


def pool(x: list[float], how: str, kernel: int) -> list[float]:
    half, out = kernel // 2, []
    for n in range(len(x)):
        near = x[max(n - half, 0) : n + half + 1]
        out.append(max(near) if how == "max" else sum(near) / kernel if how == "avg" else x[n])
    return out


def slow(part: WindowAttention, view: LayerView) -> Tensor:
    """SnapKV's steps (and CAKE's and LAVa's additions) for each head by itself, over the entries before the window."""
    rows = view_rows(view)
    b, heads, group, _, t = rows.shape
    join = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}[part.group]
    out = torch.zeros(b, heads, t, dtype=torch.float64)
    for i in range(b):
        for h in range(heads):
            length = int(view.lengths[i, h])
            prefix = max(length - part.window, 0)
            columns = []
            for g in range(group):
                a = rows[i, h, g, :, :prefix]
                s = a.sum(dim=0) / (1 if part.queries == "sum" else part.window)
                s += part.variance * ((a - a.mean(dim=0)) ** 2).mean(dim=0)
                columns.append(s.tolist())
            if part.pool_first:
                columns = [pool(c, part.pool, part.kernel) for c in columns]
                joined = [join(c) for c in zip(*columns, strict=True)]
            else:
                joined = pool([join(c) for c in zip(*columns, strict=True)], part.pool, part.kernel)
            factor = view.values[i, h, :length].double().abs().sum(dim=-1).max() if part.value_scale else 1.0
            out[i, h, :prefix] = torch.tensor(joined, dtype=torch.float64) * factor
    return out


@pytest.mark.parametrize(
    "part",
    [
        WindowAttention(5),
        WindowAttention(5, queries="sum", pool="none"),
        WindowAttention(5, pool="avg", kernel=5, group="max"),
        WindowAttention(5, queries="sum", group="sum", pool_first=False, kernel=3),
        WindowAttention(5, pool_first=False),
        WindowAttention(5, pool="avg", kernel=5, variance=200.0),
        WindowAttention(5, group="max", value_scale=True),
    ],
    ids=str,
)
def test_window_scores_are_those_of_the_algorithm_box(part: WindowAttention) -> None:
    view = layer_view(batch=2, heads=3, group=2, lengths=[[30, 6, 21], [3, 12, 30]], seen=44, window=5)
    found = part.score(view).masked_fill(~view.valid, 0.0)
    torch.testing.assert_close(found.double(), slow(part, view), atol=1e-5, rtol=1e-4)


def test_a_longer_window_was_gathered_for_another_part() -> None:
    view = layer_view(entries=30, window=12)
    narrow = layer_view(entries=30, window=12)
    assert narrow.queries is not None
    assert narrow.query_positions is not None
    narrow.queries, narrow.query_positions = narrow.queries[:, :, -4:], narrow.query_positions[:, -4:]
    torch.testing.assert_close(WindowAttention(4).score(view), WindowAttention(4).score(narrow))


@pytest.mark.parametrize("group", [1, 4])
def test_snapkv_scores_match_eager_attention_in_bf16(group: int) -> None:
    """SnapKV scores from a fused recompute match eager attention to 1e-3 relative in bf16."""
    window, entries, dim = 32, 400, 64
    view = layer_view(heads=2, group=group, entries=entries, dim=dim, window=window, dtype=torch.bfloat16)
    assert view.queries is not None
    keys = view.keys.repeat_interleave(group, dim=1)
    logits = view.queries @ keys.transpose(-1, -2) * view.scale  # in bf16, as models attend eagerly
    ahead = torch.arange(entries) > torch.arange(entries - window, entries)[:, None]
    rows = logits.masked_fill(ahead, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    mean = rows[..., : entries - window].mean(dim=2)
    pooled = torch.nn.functional.max_pool1d(mean, 7, 1, 3).view(1, 2, group, -1).mean(dim=2)
    found = WindowAttention(window).score(view)[..., : entries - window]
    torch.testing.assert_close(found, pooled, atol=0, rtol=1e-3)


def test_the_last_query_scores_every_head_alike_by_the_mean_over_all_heads() -> None:
    """TOVA: s = mean over all heads of the last row; the last token is forced."""
    view = layer_view(batch=2, heads=3, group=2, entries=20, window=4)
    score = LastQuery().score(view)
    wanted = view_rows(view)[:, :, :, -1].mean(dim=(1, 2))
    for h in range(3):
        torch.testing.assert_close(score[:, h, :-1].double(), wanted[:, :-1], atol=1e-6, rtol=1e-5)
    assert (score[..., -1:] >= score).all()


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 0}, {"kernel": 4}, {"variance": -1.0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="must be"):
        WindowAttention(**options)  # type: ignore[arg-type]
