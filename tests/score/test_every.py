"""What holds for every scorer there is, whatever it looks at."""

from __future__ import annotations

import pytest
import torch
from tests.views import alone, layer_view, scorers, with_signals

from kvthrift.core import LayerView
from kvthrift.score import Scorer

LENGTHS = [[300, 17, 261], [9, 5, 12]]


def busy_view(scorer: Scorer) -> LayerView:
    window = max(scorer.needs.window, 1)
    plain = layer_view(batch=2, heads=3, group=2, lengths=LENGTHS, seen=400, window=window)
    return with_signals(plain, needs=scorer.needs)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.name)
def test_scores_are_finite_float32_and_do_not_depend_on_what_stands_behind_a_head(scorer: Scorer) -> None:
    view = busy_view(scorer)
    score = scorer.score(view)
    assert score.shape == view.valid.shape
    assert score.dtype == torch.float32
    assert score[view.valid].isfinite().all()
    if scorer.is_mass:
        assert (score[view.valid] >= 0).all()
    quiet = busy_view(scorer)
    for tensor in (quiet.keys, quiet.values):
        tensor[~quiet.valid] = 0.5
    torch.testing.assert_close(scorer.score(quiet)[quiet.valid], score[view.valid], atol=0, rtol=0)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.name)
def test_a_sequence_scores_the_same_in_a_batch_and_alone(scorer: Scorer) -> None:
    view = busy_view(scorer)
    together = scorer.score(view)
    for b in range(2):
        single = alone(view, b)
        found = scorer.score(single)
        wanted = together[b : b + 1, :, : found.shape[-1]]
        torch.testing.assert_close(found[single.valid], wanted[single.valid], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.name)
def test_a_scorer_declares_every_signal_it_reads(scorer: Scorer) -> None:
    needs = scorer.needs
    view = busy_view(scorer)
    if not needs.window:
        view.queries = view.query_positions = None
    if not needs.moments:
        view.moments = None
    if not needs.columns:
        view.columns = None
    if not needs.rope:
        view.rope = None
    if not needs.powers:
        view.powers = {}
    if not needs.second_pass:
        view.second_pass = {}
    if not needs.segments:
        view.segments = None
    if not needs.prompt:
        view.prompt = None
    view.output_weight = None
    scorer.score(view)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.name)
def test_a_scorer_says_so_if_its_signals_are_missing(scorer: Scorer) -> None:
    view = layer_view(entries=300)
    if str(scorer.needs) == "keys and values only":
        scorer.score(view)
    else:
        with pytest.raises(ValueError, match="did not gather"):
            scorer.score(view)
