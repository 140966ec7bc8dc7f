"""Layer budgets: the published pyramid, the exact one, and the two weights of layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view, view_rows

from kvthrift import OptionError
from kvthrift.allocate import EntropyLayers, PreferenceLayers, PyramidLayers
from kvthrift.allocate.layers import exact_pyramid, pyramid

LONG = 10**6


@pytest.mark.parametrize(("capacity", "first", "last", "total"), [(128, 234, 17, 4016), (2048, 3978, 103, 65296)])
def test_published_schedule_sums(capacity: int, first: int, last: int, total: int) -> None:
    caps = pyramid(capacity - 8, LONG, 8, 32, 20)
    assert (caps[0], caps[-1], sum(caps)) == (first, last, total)


sizes = st.tuples(st.integers(1, 300), st.integers(0, 64), st.integers(1, 2000), st.integers(1, 40), st.integers(1, 30))


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_both_schedules_never_rise_nor_exceed_what_is_there(size: tuple[int, int, int, int, int]) -> None:
    base, protected, more, layers, beta = size
    prompt = base + protected + more  # longer than the budget, or nobody asks
    for schedule in (pyramid, exact_pyramid):
        caps = schedule(base, prompt, protected, layers, beta)
        assert len(caps) == layers
        assert caps == sorted(caps, reverse=True)
        assert caps[0] <= prompt - protected
        assert caps[-1] >= 0


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_the_exact_pyramid_adds_up_to_the_budget(size: tuple[int, int, int, int, int]) -> None:
    base, protected, more, layers, beta = size
    caps = exact_pyramid(base, base + protected + more, protected, layers, beta)
    assert sum(caps) == base * layers


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_the_exact_pyramid_stays_within_one_entry_of_the_published_line(
    size: tuple[int, int, int, int, int],
) -> None:
    base, protected, more, layers, beta = size
    prompt = base + protected + more
    high = pyramid(base, prompt, protected, layers, beta)[0]
    fall = 2 * (high - base) / max(layers - 1, 1)
    for layer, cap in enumerate(exact_pyramid(base, prompt, protected, layers, beta)):
        assert abs(cap - (high - layer * fall)) < 1


@pytest.mark.parametrize("schedule", [pyramid, exact_pyramid])
def test_beta_of_one_is_flat(schedule: type) -> None:
    assert set(schedule(120, LONG, 8, 32, 1)) == {120}


@pytest.mark.parametrize("schedule", [pyramid, exact_pyramid])
def test_just_below_twice_the_budget_the_pyramid_is_not_used(schedule: type) -> None:
    """n = 2(C - w) - 1 keeps exactly C everywhere; n = 2(C - w) switches."""
    assert set(schedule(120, 239, 8, 32, 20)) == {120}
    clamped = schedule(120, 240, 8, 32, 20)
    assert clamped[0] == 232  # n - w, since 2 * 120 - 6 exceeds it
    assert 8 <= clamped[-1] <= 8 + 31  # 240 - 232, and what integer steps leave
    assert set(schedule(2040, 4079, 8, 32, 20)) == {2040}
    unclamped = schedule(2040, 4080, 8, 32, 20)
    assert unclamped[0] == 3978  # 2 * 2040 - 102 is below n - w


def totals(part: PyramidLayers, capacity: int, length: int, protected: int = 8, layers: int = 32) -> list[int]:
    mean = torch.tensor([capacity])
    return [
        int(part.total(layer_view(entries=length, dim=2, layer=layer, layers=layers), mean, protected))
        for layer in range(layers)
    ]


def test_a_layer_is_told_its_place_on_the_ramp_and_its_window_on_top() -> None:
    published = totals(PyramidLayers(published_rounding=True), 128, 600)
    assert sum(published) == 4016 + 32 * 8
    assert published[0] == 234 + 8
    exact = totals(PyramidLayers(), 128, 600)
    assert sum(exact) == 32 * 128


@pytest.mark.parametrize("published", [False, True])
def test_regimes_of_a_layer_by_prompt_length(published: bool) -> None:
    part = PyramidLayers(published_rounding=published)
    assert min(totals(part, 128, 100)) >= 100  # n < C: everything stays
    assert set(totals(part, 128, 128)) == {128}
    assert set(totals(part, 128, 239)) == {128}
    assert totals(part, 128, 240)[0] == 240  # clamped to n - w, and the window


def test_sequences_of_a_batch_have_their_own_ramps() -> None:
    view = layer_view(batch=3, lengths=[[50, 50], [239, 239], [600, 600]], dim=2, layer=0, layers=32)
    view.seen = view.lengths.amax(dim=1)
    found = PyramidLayers(published_rounding=True).total(view, torch.tensor([128, 128, 128]), 8)
    assert found.tolist() == [128, 128, 242]


def test_layers_with_steadier_narrower_attention_get_less_by_the_published_formula() -> None:
    """CAKE's preference against a slow loop: H^(1/tau1) V^(1/tau2) over the window's rows before the window."""
    view = layer_view(batch=2, heads=2, group=2, entries=30, window=6)
    rows = view_rows(view)[..., :24]
    for part in (PreferenceLayers(6, 1.6, 0.4), PreferenceLayers(6, 0.9, 2.3)):
        found = part.weight(view, torch.empty(0))
        for b in range(2):
            entropies, variances = [], []
            for h in range(2):
                for g in range(2):
                    a = rows[b, h, g]  # [W, T - W]
                    entropies.append(-(a * a.log()).sum())
                    variances.append(((a - a.mean(dim=0)) ** 2).mean(dim=0).sum())
            entropy, variance = sum(entropies) / 4, sum(variances) / 4
            wanted = entropy ** (1 / part.tau1) * variance ** (1 / part.tau2)
            assert float(found[b]) == pytest.approx(float(wanted), rel=1e-4)


def test_a_layer_whose_attention_never_changes_weighs_nothing_and_is_not_nan() -> None:
    view = layer_view(entries=30, window=6)
    assert view.queries is not None
    view.queries = torch.zeros_like(view.queries)
    view.keys = view.keys * 0
    weight = PreferenceLayers(6).weight(view, torch.empty(0))
    assert weight.isfinite().all()


def test_entropy_weight_is_that_of_all_scores_of_a_layer_together() -> None:
    """LAVa's e_l against a slow loop, with padding left out."""
    view = layer_view(batch=2, lengths=[[20, 8], [5, 11]])
    scores = torch.rand(2, 2, 20)
    found = EntropyLayers().weight(view, scores)
    for b in range(2):
        flat = torch.cat([scores[b, h, : view.lengths[b, h]] for h in range(2)]).double()
        p = flat / flat.sum()
        wanted = -(p * p.log()).sum() / torch.tensor(float(len(p))).log()
        assert float(found[b]) == pytest.approx(float(wanted), rel=1e-5)


def test_entropy_weight_is_one_for_equal_scores_and_zero_for_a_single_one() -> None:
    view = layer_view(heads=3, entries=20)
    single = torch.zeros(1, 3, 20)
    single[0, 1, 7] = 5.0
    assert float(EntropyLayers().weight(view, torch.full((1, 3, 20), 0.1))) == pytest.approx(1.0, abs=1e-6)
    assert float(EntropyLayers().weight(view, single)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PyramidLayers(beta=0),
        lambda: PreferenceLayers(window=0),
        lambda: PreferenceLayers(tau1=0.0),
        lambda: PreferenceLayers(tau2=-1.0),
    ],
)
def test_options_out_of_range_are_refused(build: type) -> None:
    with pytest.raises(OptionError, match="must be"):
        build()
