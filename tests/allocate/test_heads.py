"""Head budgets: competition inside a layer, and an offline table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.views import layer_view, top
from torch import Tensor

from kvthrift import ModelMismatchError, OptionError
from kvthrift.allocate import AdaptiveHeads, TableHeads, UniformHeads
from kvthrift.core import LayerView


def contest(view: LayerView, scores: Tensor) -> Tensor:
    return scores.masked_fill(~view.valid, -torch.inf)


def split(part: AdaptiveHeads, scores: Tensor, per_head: int, lengths: list[list[int]] | None = None) -> list[int]:
    view = layer_view(heads=scores.shape[1], entries=scores.shape[2], lengths=lengths, dim=2)
    return part.split(contest(view, scores), torch.tensor([per_head]), view)[0].tolist()


def slow(scores: Tensor, per_head: int, safeguard: float) -> list[int]:
    """AdaKV's algorithm box on ``scores [H, T]`` without ties."""
    heads, entries = scores.shape
    floor = max(int(per_head * safeguard), 1)
    won = [top(scores[h], floor) for h in range(heads)]
    rest = sorted(
        ((float(scores[h, n]), h) for h in range(heads) for n in range(entries) if n not in won[h]), reverse=True
    )
    counts = [len(x) for x in won]
    for _, h in rest[: heads * per_head - sum(counts)]:
        counts[h] += 1
    return counts


shapes = st.tuples(st.integers(1, 4), st.integers(2, 40), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 1), st.data())
def test_adaptive_counts_are_those_of_the_algorithm_box(
    shape: tuple[int, int, int], safeguard: float, data: st.DataObject
) -> None:
    heads, entries, seed = shape
    per_head = data.draw(st.integers(1, entries))
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, heads, entries, generator=rng) ** (1 + 3 * torch.arange(heads)[None, :, None])
    assert split(AdaptiveHeads(safeguard), scores, per_head) == slow(scores[0], per_head, safeguard)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 40),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 999),
)
def test_adaptive_budgets_balance_over_ragged_heads(
    lengths: list[int], per_head: int, share: float, blended: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, len(lengths), max(lengths), generator=rng).round(decimals=1)  # many ties
    part = AdaptiveHeads(blend=share) if blended else AdaptiveHeads(share)
    counts = split(part, scores, per_head, [lengths])
    assert sum(counts) == min(len(lengths) * per_head, sum(lengths))
    for count, length in zip(counts, lengths, strict=True):
        floor = 1 if blended else max(1, int(share * per_head))
        assert min(floor, length) <= count <= length


def test_adaptive_sum_and_safeguard_of_a_greedy_head() -> None:
    """AdaKV: sum of head counts = K * n_keep, min count >= floor(0.2 * n_keep)."""
    scores = torch.rand(1, 4, 100)
    scores[:, 2] += 10
    counts = split(AdaptiveHeads(0.2), scores, 24)
    assert sum(counts) == 4 * 24
    assert counts == [4, 4, 84, 4]  # floor(4.8) elsewhere


@pytest.mark.parametrize("blend", [None, 0.5])
def test_identical_heads_get_equal_counts(blend: float | None) -> None:
    scores = torch.rand(1, 1, 50).expand(1, 4, 50)
    assert split(AdaptiveHeads(blend=blend), scores, 20) == [20] * 4
    assert split(AdaptiveHeads(blend=blend), torch.ones(1, 4, 50), 20) == [20] * 4


def test_alpha_of_one_is_the_uniform_budget() -> None:
    scores = torch.rand(1, 4, 50) * torch.tensor([1.0, 5.0, 20.0, 0.1])[None, :, None]
    assert split(AdaptiveHeads(1.0), scores, 20) == [20] * 4
    assert split(AdaptiveHeads(blend=0.0), scores, 20) == [20] * 4


def test_blend_is_that_share_of_competition_and_the_rest_uniform() -> None:
    scores = torch.rand(1, 2, 100)
    scores[:, 1] += 10
    assert split(AdaptiveHeads(blend=0.5), scores, 20) == [11, 29]  # half of 1 and 39, half of 20 and 20
    assert split(AdaptiveHeads(blend=0.25), scores, 20) == [15, 25]  # 15.25 and 24.75


def test_protected_entries_count_towards_every_head() -> None:
    scores = torch.rand(1, 2, 50)
    scores[:, 1] += 5
    scores[:, :, -8:] = torch.inf
    assert split(AdaptiveHeads(0.0), scores, 10) == [8, 12]


def test_uniform_heads_give_the_mean_or_all_there_is() -> None:
    view = layer_view(heads=3, lengths=[[4, 9, 30]])
    assert UniformHeads().split(torch.empty(0), torch.tensor([12]), view).tolist() == [[4, 9, 12]]
    assert UniformHeads().split(torch.empty(0), torch.tensor([0]), view).tolist() == [[1, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(1, 300),
    st.sampled_from([1.0, 1.005, 1.1, 1.2, 2.0, 10.0]),
    st.integers(0, 40),
)
def test_a_table_shares_out_exactly_the_mean(
    table: list[list[float]], per_head: int, beta: float, protected: int
) -> None:
    part = TableHeads(tuple(tuple(row) for row in table), beta, protected)
    capacities = part.capacities(per_head, 10**6, tuple(range(len(table))))
    assert capacities.sum() == per_head * capacities.size
    assert capacities.min() >= min(per_head, protected)


@pytest.mark.parametrize("beta", [1.005, 1.2, 2.0, 10.0])
@pytest.mark.parametrize("per_head", [64, 100, 128])
def test_a_constant_table_gives_the_mean_everywhere(beta: float, per_head: int) -> None:
    """HeadKV with constant S returns C everywhere."""
    part = TableHeads(((0.3,) * 4,) * 3, beta, protected=8)
    assert set(part.capacities(per_head, 10**6, (0, 1, 2)).reshape(-1).tolist()) == {per_head}


def test_a_table_follows_the_published_formula() -> None:
    """cap = S * pool + floor_min, with pool = floor(C / beta) * L * H over what is not protected."""
    table = torch.rand(3, 4, dtype=torch.float64)
    part = TableHeads(tuple(tuple(row) for row in table.tolist()), beta=1.2, protected=8)
    shared = int((128 - 8) / 1.2)
    wanted = table / table.sum() * shared * 12 + (128 - shared)
    assert abs(torch.from_numpy(part.capacities(128, 10**6, (0, 1, 2))) - wanted).max() < 1


def test_a_table_gives_each_layer_its_row_and_no_head_more_than_it_holds() -> None:
    part = TableHeads(((1.0, 0.0), (0.0, 1.0)), beta=1.0)  # all 80 entries to two heads of four
    scores, per_head = torch.empty(1, 2, 100), torch.tensor([20])
    assert part.split(scores, per_head, layer_view(entries=100, layer=0, layers=2)).tolist() == [[40, 1]]
    assert part.split(scores, per_head, layer_view(entries=100, layer=1, layers=2)).tolist() == [[1, 40]]
    ragged = layer_view(lengths=[[30, 100]], layer=0, layers=2)
    assert part.split(scores, per_head, ragged).tolist() == [[30, 1]]


def test_what_a_short_text_leaves_of_a_table_goes_to_other_heads() -> None:
    part = TableHeads(((1.0, 0.0), (0.0, 0.5)), beta=1.0)
    capacities = part.capacities(20, 30, (0, 1))
    assert capacities.sum() == 80
    assert capacities[0, 0] == 30
    assert capacities[1, 1] == 30
    assert capacities.max() <= 30


def test_layers_left_whole_are_skipped_in_the_table() -> None:
    part = TableHeads(((9.0, 9.0), (1.0, 0.0), (9.0, 9.0), (0.0, 1.0)), beta=1.0)
    view = layer_view(entries=100, layer=1, layers=2)
    view.numbers = (1, 3)
    assert part.split(torch.empty(1, 2, 100), torch.tensor([20]), view).tolist() == [[1, 40]]


def test_a_table_for_another_model_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="3 layers of 2 KV heads, but this model has at least 4 of 2"):
        TableHeads(((1.0, 1.0),) * 3).split(torch.rand(1, 2, 40), torch.tensor([8]), layer_view())
    with pytest.raises(ModelMismatchError, match="0 layers"):
        TableHeads().split(torch.rand(1, 2, 40), torch.tensor([8]), layer_view())


@pytest.mark.parametrize(
    "build",
    [
        lambda: AdaptiveHeads(-0.1),
        lambda: AdaptiveHeads(1.1),
        lambda: AdaptiveHeads(float("nan")),
        lambda: AdaptiveHeads(blend=2.0),
        lambda: TableHeads(beta=0.5),
        lambda: TableHeads(((1.0, -1.0),)),
        lambda: TableHeads(((1.0, float("nan")),)),
        lambda: TableHeads(((1.0, 1.0), (1.0,))),
        lambda: TableHeads(protected=-1),
    ],
)
def test_options_out_of_range_are_refused(build: type) -> None:
    with pytest.raises(OptionError, match="must"):
        build()
