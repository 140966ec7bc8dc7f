"""Truncated matrix entropy and the groups made of it (UNComp's specification)."""

from __future__ import annotations

import pytest
import torch

from kvthrift import CalibrationError
from kvthrift.calibrate import Artefact, Meta, load_named
from kvthrift.calibrate.entropy import (
    KIND,
    effective_ranks,
    entropies,
    group_sizes,
    head_groups,
    layer_groups,
    staged_lengths,
    truncated_entropy,
)

D = 128


def test_queries_along_all_axes() -> None:
    both = torch.cat((torch.eye(D), -torch.eye(D)))
    assert float(truncated_entropy(both)) == pytest.approx(0.25, abs=1e-6)
    assert float(truncated_entropy(both, top=D)) == pytest.approx(1.0, abs=1e-6)


def test_queries_along_one_line_have_none() -> None:
    u = torch.randn(D)
    assert float(truncated_entropy(torch.stack((u, -u)).repeat(50, 1))) == pytest.approx(0.0, abs=1e-6)
    assert float(truncated_entropy(u.expand(40, D))) == pytest.approx(0.0, abs=1e-6)  # all equal: 0 / 0


def test_gaussian_queries() -> None:
    rows = torch.randn(4096, D, generator=torch.Generator().manual_seed(0))
    assert float(truncated_entropy(rows)) == pytest.approx(0.295, abs=0.01)


def test_heads_are_measured_side_by_side() -> None:
    x = torch.randn(3, 2, 60, 16, generator=torch.Generator().manual_seed(0)) + 5.0
    found = truncated_entropy(x)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[1, 0], truncated_entropy(x[1, 0]))
    assert bool(((found > 0) & (found <= 1)).all())


@pytest.mark.parametrize(
    ("heads", "groups", "wanted"),
    [(32, 2, [16, 16]), (32, 3, [11, 10, 11]), (32, 5, [7, 6, 6, 6, 7]), (32, 8, [4] * 8), (3, 2, [2, 1])],
)
def test_groups_are_as_even_as_can_be(heads: int, groups: int, wanted: list[int]) -> None:
    assert group_sizes(heads, groups) == wanted


def test_two_groups_by_votes() -> None:
    texts = torch.tensor([[[0.1, 0.9, 0.8, 0.2]], [[0.9, 0.8, 0.1, 0.2]], [[0.3, 0.9, 0.1, 0.4]]])
    assert head_groups(texts, 2) == ((1, 1, 0, 0),)  # votes for the upper: 1, 3, 1, 1; ties to the lowest head


def test_more_groups_are_filled_from_the_lowest() -> None:
    texts = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]] * 2 + [[[0.4, 0.3, 0.2, 0.1]]])
    assert head_groups(texts, 4) == ((0, 1, 2, 3),)
    found = head_groups(torch.rand(9, 5, 32, generator=torch.Generator().manual_seed(1)), 3)
    assert all(sorted(row) == [0] * 11 + [1] * 10 + [2] * 11 for row in found)


def test_a_layer_group_begins_where_the_effective_rank_falls() -> None:
    ranks = [40.0, 39.5, 38.0, 38.2, 37.9, 36.0]
    assert layer_groups(ranks) == [0, 0, 1, 1, 1, 2]
    assert layer_groups([5.0]) == [0]


def test_staged_lengths_of_llama_2() -> None:
    labels = [0] * 2 + [1] * 13 + [2] * 11 + [3] * 5 + [4]
    found = staged_lengths(labels, 4096)
    assert [found[n] for n in (0, 2, 15, 26, 31)] == [4096, 3456, 2816, 2176, 1536]
    assert staged_lengths([0, 0], 4096) == [4096, 4096]


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_ranks(torch.full((2, 3, 4), 0.5, dtype=torch.float64), 64) == pytest.approx([8.0] * 3)


def test_the_shipped_entropies_are_those_of_the_embedded_model() -> None:
    found = load_named("smollm2", method="uncomp", kind=KIND)
    table = entropies(found)
    assert table.shape[1:] == (30, 3, 3)
    assert found.meta.provenance["head_dim"] == 64


@pytest.mark.parametrize(
    "table", [torch.rand(4, 2, 3), torch.rand(0, 2, 4), torch.full((4, 2, 4), 2.0), torch.full((1, 2, 4), float("nan"))]
)
def test_damaged_entropies_are_refused(table: torch.Tensor) -> None:
    meta = Meta(KIND, "uncomp", "abc", "llama", 2, 2, {})
    with pytest.raises(CalibrationError, match="no entropy between 0 and 1"):
        entropies(Artefact(meta, {"entropy": table}))
    with pytest.raises(CalibrationError):
        entropies(Artefact(meta, {}))
