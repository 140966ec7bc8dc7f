"""Lag-relative scores against the published steps, partition by partition."""

from __future__ import annotations

import pytest
from tests.views import layer_view
from torch import Tensor

from kvthrift import OptionError
from kvthrift.core import LayerView
from kvthrift.score import LagRelative


def slow(part: LagRelative, keys: Tensor, values: Tensor) -> list[float]:
    """One head, ``keys [n, D]``: LagKV's steps without its short-prompt rule."""
    n, lag = len(keys), part.lag
    out = [1.0] * n
    count = (n - part.sinks) // lag
    for p in range(count - 1):
        start = part.sinks + p * lag
        spreads = []
        for x in (keys.double(), values.double()):
            this, following = x[start : start + lag], x[start + lag : start + 2 * lag]
            low, high = following.min(dim=0).values, following.max(dim=0).values
            spreads.append(((this - low) / (high - low)).std(dim=-1).softmax(dim=0))
        value = ((spreads[0] + spreads[1]) / 2).tolist()
        for place, index in enumerate(sorted(range(lag), key=lambda n: value[n])):
            out[start + index] = place / lag
    return out


def test_lag_scores_are_those_of_the_algorithm_box() -> None:
    part = LagRelative(sinks=2, lag=6)
    lengths = [[40, 14, 27], [26, 38, 15]]
    view = layer_view(batch=2, heads=3, lengths=lengths)
    score = part.score(view)
    for b in range(2):
        for h in range(3):
            n = lengths[b][h]
            wanted = slow(part, view.keys[b, h, :n], view.values[b, h, :n])
            assert score[b, h, :n].tolist() == pytest.approx(wanted)


def test_every_partition_before_the_last_loses_the_same_share() -> None:
    score = LagRelative(sinks=4, lag=10).score(layer_view(entries=4 + 50 + 7))
    for start in (4, 14, 24, 34):
        assert score[0, 0, start : start + 10].sort().values.tolist() == pytest.approx([n / 10 for n in range(10)])
    assert (score[..., :4] == 1).all()
    assert (score[..., 44:] == 1).all()


@pytest.mark.parametrize("entries", [1, 3, 4, 13, 23])
def test_short_prompts_keep_the_newest(entries: int) -> None:
    """T < 4 + 2 * lag."""
    score = LagRelative(sinks=4, lag=10).score(layer_view(entries=entries))
    assert (score.diff(dim=-1) > 0).all()
    assert LagRelative(sinks=4, lag=10).score(layer_view(entries=24)).diff(dim=-1).min() <= 0


def test_a_short_head_beside_a_long_one_keeps_its_newest() -> None:
    view = layer_view(lengths=[[60, 20]])
    score = LagRelative(sinks=4, lag=10).score(view)
    assert (score[0, 1, :20].diff() > 0).all()
    assert score[0, 0].unique().numel() == 11


def constant(view: LayerView, start: int, stop: int) -> LayerView:
    view.keys[:, :, start:stop] = view.keys[:, :, start : start + 1]
    view.values[:, :, start:stop] = 0.0
    return view


def test_a_constant_second_partition_gives_no_nan() -> None:
    view = constant(layer_view(entries=34), 14, 24)
    view.keys[:, :, 9] *= 100  # stands out, which a spread of nan would hide
    view.values[:, :, 9] *= 100
    score = LagRelative(sinks=4, lag=10).score(view)
    assert score.isfinite().all()
    assert (score[..., 9] == 0.9).all()
    assert score[0, 0, 4:14].sort().values.tolist() == pytest.approx([n / 10 for n in range(10)])


@pytest.mark.parametrize("options", [{"sinks": -1}, {"lag": 1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="must be"):
        LagRelative(**options)
