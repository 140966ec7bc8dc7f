"""CAKE and LAVa: budgets over layers that are found while layers arrive are those found from all layers at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kvthrift import Recipe, method
from kvthrift.core import LayerView, no_facts
from kvthrift.runtime import CacheState, cascade
from kvthrift.runtime.compress import choose, layer_totals
from kvthrift.runtime.layer import LayerCache

LAYERS, H, G, D, W = 8, 2, 2, 16, 4
BUDGET = 24


@dataclass
class Layer:
    q: Tensor
    k: Tensor
    v: Tensor


def text_of(prompt: int, batch: int, order: str) -> list[Layer]:
    """Layers from vague to sharp attention, or the other way, or mixed."""
    rng = torch.Generator().manual_seed(prompt)
    sharpness = torch.linspace(0.3, 4.0, LAYERS).tolist()
    if order == "sharp first":
        sharpness.reverse()
    elif order == "mixed":
        sharpness = sharpness[::2] + sharpness[1::2]
    out = []
    for s in sharpness:
        common = torch.randn(batch, H * G, 1, D, generator=rng)  # sharp layers agree on where to look
        q = s * (common + 0.4 * torch.randn(batch, H * G, prompt, D, generator=rng))
        k, v = torch.randn(2, batch, H, prompt, D, generator=rng)
        k[:, 1] *= 1.5  # heads differ, too
        out.append(Layer(q, k, v))
    return out


def recipes() -> list[Recipe]:
    return [
        method("cake", window=W, budget=BUDGET),
        method("cake", window=W, budget=BUDGET, tau1=0.4, tau2=0.6),
        method("lava", window=W, budget=BUDGET),
    ]


def arrive(recipe: Recipe, layers: list[Layer]) -> tuple[CacheState, list[int]]:
    """The state after all layers, and the entries that it held after each."""
    state = CacheState(recipe, list(range(LAYERS)), set(), page=16)
    most = []
    for place, x in enumerate(layers):
        state.attend(place, x.q, x.k, x.v, scale=D**-0.5, mask=None, facts=no_facts("nothing is known here"))
        held = [layer.store.lengths.sum(axis=1) for layer in state.layers[: place + 1] if layer.store is not None]
        most.append(int(np.sum(held)))
    return state, most


def one_shot(recipe: Recipe, layers: list[Layer]) -> tuple[Tensor, list[Tensor]]:
    """Totals ``[L, B]`` and kept sets ``[B, H, T]`` from the weights of all layers at once."""
    weights, views, scores = [], [], []
    for index, x in enumerate(layers):
        b, _, t = x.k.shape[:3]
        view = LayerView(
            layer=index,
            layers=LAYERS,
            keys=x.k,
            values=x.v,
            positions=torch.arange(t).expand(b, H, t),
            lengths=torch.full((b, H), t),
            seen=torch.full((b,), t),
            scale=D**-0.5,
            group=G,
            queries=x.q[:, :, -W:],
            query_positions=torch.arange(t - W, t).expand(b, W),
        )
        scores.append(recipe.scorer.score(view))
        weights.append(recipe.layers.weight(view, scores[-1]))
        views.append(view)
    batch, length = layers[0].k.shape[0], layers[0].k.shape[2]
    lengths = [np.full(batch, length, dtype=np.int64)] * LAYERS
    totals = layer_totals(weights, torch.full((batch,), BUDGET), W, lengths, LAYERS)
    table = torch.from_numpy(np.stack(totals))
    keeps = [choose(recipe, v, s, t) for v, s, t in zip(views, scores, table, strict=True)]
    return table, keeps


@pytest.mark.parametrize("recipe", recipes(), ids=["cake", "cake-steep", "lava"])
@pytest.mark.parametrize("order", ["vague first", "sharp first", "mixed"])
@pytest.mark.parametrize(("prompt", "batch"), [(200, 1), (60, 2)])
def test_the_cascade_is_the_one_shot_cut(recipe: Recipe, order: str, prompt: int, batch: int) -> None:
    layers = text_of(prompt, batch, order)
    state, most = arrive(recipe, layers)
    totals, keeps = one_shot(recipe, layers)
    whole = LAYERS * BUDGET * H * batch
    assert max(most) <= (1 + cascade.SLACK) * whole  # whichever layers are still to come
    assert whole - LAYERS * H * batch <= most[-1] <= whole
    assert totals.sum(dim=0).tolist() == [LAYERS * BUDGET] * batch
    assert totals.float().std(dim=0).min() > 1  # layers do differ, or this test says nothing
    same = 0
    for place, layer in enumerate(state.layers):
        assert layer.store is not None
        lengths = torch.from_numpy(layer.store.lengths)
        assert ((lengths.sum(dim=1) - totals[place] * H).abs() <= H).all()  # one entry a head
        for b in range(batch):
            if int(lengths[b].sum()) == int(totals[place, b]) * H:
                same += 1
                for h in range(H):
                    wanted = keeps[place][b, h].nonzero()[:, 0].tolist()
                    assert layer.store.positions()[b, h, : lengths[b, h]].tolist() == wanted
    assert same > LAYERS * batch // 2


def count_cuts(recipe: Recipe, layers: list[Layer], monkeypatch: pytest.MonkeyPatch) -> tuple[list[object], int]:
    """What every layer holds in the end, and how often a finished layer was cut further."""
    cut, made = LayerCache.cut, []

    def counted(self: LayerCache, state: CacheState, per_head: Tensor) -> None:
        made.append(self.index)
        cut(self, state, per_head)

    monkeypatch.setattr(LayerCache, "cut", counted)
    state, _ = arrive(recipe, layers)
    monkeypatch.setattr(LayerCache, "cut", cut)
    held = [(x.store.lengths.tolist(), x.store.positions().tolist()) for x in state.layers if x.store is not None]
    return [*held], len(made)


@pytest.mark.parametrize("recipe", recipes(), ids=["cake", "cake-steep", "lava"])
@pytest.mark.parametrize("order", ["vague first", "sharp first", "mixed"])
def test_cutting_late_keeps_what_cutting_at_once_keeps(
    recipe: Recipe, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, late_cuts = count_cuts(recipe, text_of(200, 2, order), monkeypatch)
    monkeypatch.setattr(cascade, "lazy", lambda _: False)
    at_once, cuts = count_cuts(recipe, text_of(200, 2, order), monkeypatch)
    assert late == at_once
    assert late_cuts < cuts


@pytest.mark.parametrize("recipe", recipes(), ids=["cake", "cake-steep", "lava"])
def test_a_text_within_the_budget_is_left_whole_in_every_layer(recipe: Recipe) -> None:
    state, _ = arrive(recipe, text_of(BUDGET, 1, "mixed"))
    assert all((x.store.lengths == BUDGET).all() for x in state.layers if x.store is not None)


@pytest.mark.parametrize("recipe", recipes(), ids=["cake", "cake-steep", "lava"])
def test_a_text_just_above_the_budget_keeps_every_window(recipe: Recipe) -> None:
    state, most = arrive(recipe, text_of(BUDGET + 1, 1, "mixed"))
    assert most[-1] <= LAYERS * BUDGET * H
    for layer in state.layers:
        assert layer.store is not None
        for h in range(H):
            positions = layer.store.positions()[0, h, : layer.store.lengths[0, h]].tolist()
            assert positions[-W:] == list(range(BUDGET + 1 - W, BUDGET + 1))
