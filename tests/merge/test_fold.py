"""Folding: merged values are means of what was folded, and nobody's weight is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view, scorers
from torch import Tensor

from kvthrift import Recipe, RecipeError
from kvthrift.core import LayerView
from kvthrift.kernels import naive
from kvthrift.merge import Evict, MassFold
from kvthrift.merge import fold as module
from kvthrift.score import AttentionReceived, Scorer


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerView, Tensor, Tensor]:
    heads = draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 25)) for _ in range(heads)]
    view = layer_view(heads=heads, lengths=[lengths], dim=4, seed=draw(st.integers(0, 999)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    keep = (torch.rand(view.valid.shape, generator=rng) < draw(st.floats(0, 1))) & view.valid
    keep[..., 0] = True  # a recipe never empties a head
    scores = torch.rand(view.valid.shape, generator=rng) + draw(st.sampled_from([0.0, 0.1]))
    return view, keep, scores


def members(view: LayerView, keep: Tensor, h: int) -> dict[int, list[int]]:
    """Who goes where in head ``h``: kept entry -> itself and what is nearest to it by cosine."""
    n = int(view.lengths[0, h])
    keys = torch.nn.functional.normalize(view.keys[0, h, :n], dim=-1)
    stay = [i for i in range(n) if keep[0, h, i]]
    out = {i: [i] for i in stay}
    for i in range(n):
        if i not in out:
            out[max(stay, key=lambda j: float(keys[i] @ keys[j]))].append(i)
    return out


@settings(max_examples=80, deadline=None)
@given(cases())
def test_a_merged_value_is_the_weighted_mean_of_its_members(case: tuple[LayerView, Tensor, Tensor]) -> None:
    view, keep, scores = case
    merged = MassFold().merge(view, keep, scores, None)
    assert merged.bias is not None
    for h in range(keep.shape[1]):
        for target, group in members(view, keep, h).items():
            weight = scores[0, h, group].double()
            values = view.values[0, h, group].double()
            mean = (weight[:, None] * values).sum(dim=0) / weight.sum()
            torch.testing.assert_close(merged.values[0, h, target].double(), mean, atol=1e-4, rtol=1e-3)
            wanted = min(float((weight.sum() / weight[0]).log()), float(torch.tensor(len(group)).log()))
            assert float(merged.bias[0, h, target]) == pytest.approx(wanted, abs=1e-3)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_merged_values_lie_within_the_values_there_were_and_bias_is_never_negative(
    case: tuple[LayerView, Tensor, Tensor],
) -> None:
    view, keep, scores = case
    merged = MassFold().merge(view, keep, scores * 1e-20, None)  # masses far below float32's comfort
    assert merged.bias is not None
    assert (merged.bias >= 0).all()
    assert merged.bias.isfinite().all()
    assert (merged.bias[~keep] == 0).all()
    for h in range(keep.shape[1]):
        real = view.values[0, h, : view.lengths[0, h]]
        inside = merged.values[0, h][keep[0, h]]
        assert (inside >= real.amin(dim=0) - 1e-4).all()
        assert (inside <= real.amax(dim=0) + 1e-4).all()


def test_nothing_dropped_is_nothing_changed() -> None:
    view = layer_view(heads=3, lengths=[[9, 14, 3]])
    scores = torch.rand(view.valid.shape)
    merged = MassFold().merge(view, view.valid, scores, None)
    torch.testing.assert_close(merged.values, view.values, atol=1e-6, rtol=1e-6)
    assert merged.bias is not None
    assert (merged.bias == 0).all()
    earlier = torch.rand(view.valid.shape).masked_fill(~view.valid, 0.0)
    again = MassFold().merge(view, view.valid, scores, earlier)
    assert again.bias is not None
    bounded = torch.minimum(again.bias, earlier)  # what an entry stands for already is not lost
    torch.testing.assert_close(bounded, earlier, atol=1e-5, rtol=1e-5)


def test_equal_entries_folded_into_one_are_attended_to_as_before() -> None:
    """Copies of one key: the log-mass bias makes one entry weigh as much as all of them did."""
    view = layer_view(heads=1, entries=6)
    view.keys[:, :, 2:5] = view.keys[:, :, 1:2]
    keep = torch.tensor([[[True, True, False, False, False, True]]])
    merged = MassFold().merge(view, keep, torch.full((1, 1, 6), 0.2), None)
    assert merged.bias is not None
    q = torch.randn(1, 1, 5, 8)
    whole = naive.attend(q, view.keys, view.values, scale=view.scale)
    fewer = naive.attend(
        q,
        view.keys[keep][None, None],
        merged.values[keep][None, None],
        scale=view.scale,
        bias=merged.bias[keep][None, None],
    )
    torch.testing.assert_close(fewer.out, whole.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fewer.lse, whole.lse, atol=1e-5, rtol=1e-5)


def test_folding_twice_counts_everyone_once() -> None:
    view = layer_view(heads=1, entries=4)
    view.keys[:] = view.keys[:, :, :1]
    scores = torch.full((1, 1, 4), 0.5)
    first = MassFold().merge(view, torch.tensor([[[True, True, False, False]]]), scores, None)
    view.values = first.values
    second_view = layer_view(heads=1, entries=2)
    second_view.keys, second_view.values = view.keys[:, :, :2], first.values[:, :, :2]
    assert first.bias is not None
    second = MassFold().merge(second_view, torch.tensor([[[True, False]]]), scores[..., :2], first.bias[..., :2])
    assert second.bias is not None
    assert float(second.bias[0, 0, 0]) == pytest.approx(float(torch.tensor(4.0).log()), abs=1e-5)
    mean = layer_view(heads=1, entries=4).values.mean(dim=2)
    torch.testing.assert_close(second.values[:, :, 0], mean, atol=1e-5, rtol=1e-5)


def test_targets_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    view = layer_view(heads=2, lengths=[[40, 33]])
    keep = (torch.rand(view.valid.shape) < 0.3) & view.valid
    keep[..., 0] = True
    scores = torch.rand(view.valid.shape)
    whole = MassFold().merge(view, keep, scores, None)
    monkeypatch.setattr(module, "_BLOCK", 7)
    parted = MassFold().merge(view, keep, scores, None)
    torch.testing.assert_close(parted.values, whole.values)
    torch.testing.assert_close(parted.bias, whole.bias)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.name)
def test_scores_that_are_no_masses_are_refused(scorer: Scorer) -> None:
    if scorer.is_mass:
        assert Recipe("mine", scorer, merge=MassFold()).merge == MassFold()
    else:
        with pytest.raises(RecipeError, match=f"{scorer.name} scores are no masses"):
            Recipe("mine", scorer, merge=MassFold())


def test_eviction_changes_nothing_that_stays() -> None:
    view = layer_view()
    bias = torch.rand(view.valid.shape)
    merged = Evict().merge(view, view.valid, torch.rand(view.valid.shape), bias)
    assert merged.values is view.values
    assert merged.bias is bias
    Evict().check(AttentionReceived())
