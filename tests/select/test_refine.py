"""The second look of CriticalKV against its two stages, head by head."""

from __future__ import annotations

import pytest
import torch
from tests.views import layer_view, top, with_signals
from torch import Tensor

from kvthrift import OptionError
from kvthrift.core import LayerView
from kvthrift.select import OutputAware, TokenUnit, refine


def ready(**sizes: object) -> tuple[LayerView, Tensor, Tensor]:
    view = with_signals(layer_view(batch=2, heads=3, group=2, lengths=[[30, 12, 7], [9, 30, 21]], **sizes))  # type: ignore[arg-type]
    return view, torch.rand(view.valid.shape), view.tail(2)


def test_half_stays_by_score_and_half_by_what_it_adds_to_the_output() -> None:
    view, scores, protected = ready()
    assert view.output_weight is not None
    counts = torch.tensor([[11, 6, 7], [4, 20, 10]])
    refined = OutputAware().refine(scores, counts, protected, view)
    keep = TokenUnit().select(refined, counts, protected, view)
    for b in range(2):
        for h in range(3):
            n, count = int(view.lengths[b, h]), int(counts[b, h])
            s = scores[b, h, :n].masked_fill(protected[b, h, :n], 9.0)
            first = top(s, count // 2)
            norms = [
                (view.values[b, h, :n].double() @ view.output_weight[2 * h + g].double()).abs().sum(dim=-1)
                for g in range(2)
            ]
            second = (scores[b, h, :n].double() + 1e-4) * sum(norms) / 2
            second[sorted(first)] = torch.inf
            second[protected[b, h, :n]] = torch.inf
            assert set(keep[b, h].nonzero()[:, 0].tolist()) == top(second, count)


def test_values_that_all_add_as_much_leave_the_base_choice() -> None:
    """W_o rows of equal L1 image: CriticalKV equals the base."""
    view, scores, protected = ready()
    view.values = torch.ones_like(view.values) * torch.randn(8).sign()
    counts = torch.tensor([[11, 6, 7], [4, 20, 10]])
    refined = OutputAware(0.3).refine(scores, counts, protected, view)
    assert torch.equal(
        TokenUnit().select(refined, counts, protected, view), TokenUnit().select(scores, counts, protected, view)
    )


def test_all_of_the_room_by_score_is_the_base_choice() -> None:
    view, scores, protected = ready()
    counts = torch.tensor([[11, 6, 7], [4, 20, 10]])
    refined = OutputAware(first=1.0).refine(scores, counts, protected, view)
    assert torch.equal(
        TokenUnit().select(refined, counts, protected, view), TokenUnit().select(scores, counts, protected, view)
    )


def test_without_the_value_norm_no_output_projection_is_asked_for() -> None:
    view, scores, protected = ready()
    view.output_weight = None
    part = OutputAware(value_norm=False)
    assert not part.needs.output_weight
    counts = torch.tensor([[11, 6, 7], [4, 20, 10]])
    refined = part.refine(scores, counts, protected, view)
    assert torch.equal(
        TokenUnit().select(refined, counts, protected, view), TokenUnit().select(scores, counts, protected, view)
    )
    with pytest.raises(ValueError, match="did not gather"):
        OutputAware().refine(scores, counts, protected, view)


def test_contributions_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    view, scores, protected = ready()
    counts = torch.tensor([[11, 6, 7], [4, 20, 10]])
    whole = OutputAware().refine(scores, counts, protected, view)
    monkeypatch.setattr(refine, "_BLOCK", 7)
    torch.testing.assert_close(OutputAware().refine(scores, counts, protected, view), whole)


@pytest.mark.parametrize("options", [{"first": -0.1}, {"first": 1.5}, {"epsilon": -1.0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="must"):
        OutputAware(**options)
