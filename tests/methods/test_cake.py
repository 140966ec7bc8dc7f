"""CAKE and LAVa as their papers write them, head by head, against the recipes of those names."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, view_rows
from torch import Tensor

from kvthrift import method
from kvthrift.core import LayerView

W, T = 32, 90


def rows_of(view: LayerView) -> Tensor:
    """``A[h, i, j]`` for the window's rows and the columns before the window: ``[H, G, W, T - W]``."""
    return view_rows(view)[0, ..., : T - W]


def pooled(x: Tensor, kernel: int, how: str) -> Tensor:
    half = kernel // 2
    near = [x[max(j - half, 0) : j + half + 1] for j in range(len(x))]
    return torch.stack([n.max() if how == "max" else n.sum() / kernel for n in near])


@pytest.fixture
def view() -> LayerView:
    return layer_view(heads=3, group=2, entries=T, window=W, dim=16)


def test_cake_scores_mean_plus_200_variances_average_pooled_by_5(view: LayerView) -> None:
    a = rows_of(view)
    wanted = torch.zeros(3, T - W, dtype=torch.float64)
    for h in range(3):
        for g in range(2):
            mean = a[h, g].mean(dim=0)
            variance = ((a[h, g] - mean) ** 2).mean(dim=0)
            wanted[h] += pooled(mean + 200 * variance, 5, "avg") / 2
    found = method("cake").scorer.score(view)[0, :, : T - W]
    torch.testing.assert_close(found.double(), wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("tau1", "tau2"), [(1.6, 0.4), (0.4, 0.6)])
def test_cake_prefers_layers_by_entropy_and_variance(view: LayerView, tau1: float, tau2: float) -> None:
    """Up to a factor that all layers share: P = H^(1/tau1) V^(1/tau2)."""
    part = method("cake", tau1=tau1, tau2=tau2).layers
    other = layer_view(heads=3, group=2, entries=T, window=W, dim=16, seed=5)
    other.keys *= 4
    found, wanted = [], []
    for layer in (view, other):
        a = rows_of(layer)
        entropy = -(a * a.clamp(min=1e-300).log()).sum()
        variance = ((a - a.mean(dim=2, keepdim=True)) ** 2).mean(dim=2).sum()
        wanted.append(entropy ** (1 / tau1) * variance ** (1 / tau2))
        found.append(part.weight(layer, torch.empty(0)))
    assert float(found[0] / found[1]) == pytest.approx(float(wanted[0] / wanted[1]), rel=1e-3)


def test_lava_scores_max_pooled_means_times_the_largest_value_norm_max_over_the_group(view: LayerView) -> None:
    a = rows_of(view)
    wanted = torch.zeros(3, T - W, dtype=torch.float64)
    for h in range(3):
        largest = view.values[0, h].double().abs().sum(dim=-1).max()
        for g in range(2):
            wanted[h] = torch.maximum(wanted[h], pooled(a[h, g].mean(dim=0), 7, "max") * largest)
    recipe = method("lava")
    score = recipe.scorer.score(view)
    torch.testing.assert_close(score[0, :, : T - W].double(), wanted, atol=1e-6, rtol=1e-4)
    p = (wanted / wanted.sum()).flatten()
    entropy = -(p * p.log()).sum()
    ratio = float(recipe.layers.weight(view, score)) / float(entropy)
    assert ratio == pytest.approx(1 / float(torch.tensor(3.0 * T).log()), rel=1e-4)  # a factor all layers share


def test_lava_shares_a_layer_over_heads_with_a_floor_of_a_fifth() -> None:
    recipe = method("lava")
    scores = torch.rand(1, 3, T)
    scores[:, 1] += 10
    view = layer_view(heads=3, entries=T)
    counts = recipe.heads.split(scores, torch.tensor([40]), view)[0].tolist()
    assert counts == [15, T, 15]  # the head that wins holds all it has; what is left goes to the others
    counts = recipe.heads.split(scores, torch.tensor([25]), view)[0].tolist()
    assert counts == [5, 65, 5]
