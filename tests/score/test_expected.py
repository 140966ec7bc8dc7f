"""Expected attention against its formula, matrix by matrix in float64."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, moments, plain_rope
from torch import Tensor

from kvthrift import OptionError
from kvthrift.core import LayerView, Rope
from kvthrift.score import ExpectedAttention
from kvthrift.score.expected import mean_rotation

DIM = 8


def turn(rope: Rope, position: int, dim: int) -> Tensor:
    """One RoPE matrix in the half-split convention; dims beyond the embedding stay."""
    out, half = torch.eye(dim, dtype=torch.float64), len(rope.inv_freq)
    for n, frequency in enumerate(rope.inv_freq.double()):
        cos, sin = (position * frequency).cos(), (position * frequency).sin()
        out[n, n] = out[n + half, n + half] = cos * rope.attention_scaling
        out[n, n + half], out[n + half, n] = -sin * rope.attention_scaling, sin * rope.attention_scaling
    return out


def slow(part: ExpectedAttention, view: LayerView, queries: Tensor, rope: Rope) -> Tensor:
    b, heads, t, dim = view.keys.shape
    out = torch.zeros(b, heads, t, dtype=torch.float64)
    for i in range(b):
        seen = int(view.seen[i])
        mean_turn = sum(turn(rope, p, dim) for p in range(seen, seen + part.future)) / part.future
        for h in range(heads):
            n = int(view.lengths[i, h])
            keys, values = view.keys[i, h, :n].double(), view.values[i, h, :n].double()
            free = view.positions[i, h, :n] >= part.sinks
            total = torch.zeros(n, dtype=torch.float64)
            for g in range(view.group):
                x = queries[i, h * view.group + g].double()  # [N, D]
                mu = mean_turn @ x.mean(dim=0)
                spread = mean_turn @ torch.cov(x.T, correction=0) @ mean_turn.T
                z = keys @ mu / dim**0.5
                if part.covariance:
                    z += (keys @ spread * keys).sum(dim=-1) / (2 * dim)
                total[free] += z[free].softmax(dim=0) / view.group
            score = total + part.epsilon
            out[i, h, :n] = score * (values.norm(dim=-1) if part.value_norm else 1.0)
    return out


def ready(queries: Tensor, rope: Rope, **sizes: object) -> LayerView:
    view = layer_view(dim=DIM, **sizes)  # type: ignore[arg-type]
    view.rope, view.moments = rope, moments(queries)
    return view


@pytest.mark.parametrize(
    "part",
    [
        ExpectedAttention(future=5),
        ExpectedAttention(future=64, sinks=0, epsilon=0.02),
        ExpectedAttention(future=3, covariance=False, sinks=2),
        ExpectedAttention(future=3, value_norm=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rotated", [DIM, DIM // 2])
def test_expected_attention_is_its_formula(part: ExpectedAttention, rotated: int) -> None:
    queries, rope = torch.randn(2, 6, 20, DIM), plain_rope(rotated, scaling=1.0 if rotated < DIM else 1.2)
    view = ready(queries, rope, batch=2, heads=3, group=2, lengths=[[20, 9, 14], [12, 3, 5]], seen=30)
    free = view.valid & (view.positions >= part.sinks)
    found = part.score(view)[free]
    torch.testing.assert_close(found.double(), slow(part, view, queries, rope)[free], atol=1e-5, rtol=1e-3)


def test_one_query_without_covariance_is_that_query_at_position_T() -> None:
    """Zero covariance, n_future=1 at T, one prompt query: its attention at position T times ||v||."""
    query, rope = torch.randn(1, 2, 1, DIM), plain_rope(DIM)
    view = ready(query, rope, heads=2, entries=30)
    turned = rope.rotate(query, torch.tensor([[[30]]]))
    attention = (turned @ view.keys[:, :, 4:].transpose(-1, -2) * view.scale).softmax(dim=-1)[:, :, 0]
    found = ExpectedAttention(future=1, sinks=4).score(view)[..., 4:]
    torch.testing.assert_close(found, attention * view.values[:, :, 4:].norm(dim=-1), atol=1e-5, rtol=1e-3)


def test_sinks_score_no_less_than_anything_else() -> None:
    view = ready(torch.randn(1, 2, 20, DIM), plain_rope(DIM), entries=30)
    score = ExpectedAttention(sinks=3).score(view)
    assert (score[..., :3] >= score.amax(dim=-1, keepdim=True)).all()


def test_a_head_of_nothing_but_sinks_is_not_nan() -> None:
    view = ready(torch.randn(1, 2, 20, DIM), plain_rope(DIM), entries=4)
    assert ExpectedAttention(sinks=8).score(view).isfinite().all()


def test_the_mean_of_rotations_shrinks_fast_pairs_and_leaves_slow_ones() -> None:
    rope = Rope(torch.tensor([3.0, 1e-6]))
    found = mean_rotation(rope, torch.tensor([7]), 512, 4)[0]
    assert found[0, 0].abs() < 0.01
    assert found[1, 1] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("options", [{"future": 0}, {"sinks": -1}, {"epsilon": -0.1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="must be"):
        ExpectedAttention(**options)  # type: ignore[arg-type]
