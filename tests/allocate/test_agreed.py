"""Layers that agree on their tokens: a mean over layers, by position."""

from __future__ import annotations

import pytest
import torch

from kvthrift import RecipeError
from kvthrift.allocate import AgreedLayers, PoolLayers


def test_scores_become_the_mean_of_those_layers_that_hold_a_token() -> None:
    scores = [torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[5.0, 7.0, 99.0]]])]
    positions = [torch.tensor([[[0, 4, 9]]]), torch.tensor([[[4, 9, 0]]])]
    valid = [torch.tensor([[[True, True, True]]]), torch.tensor([[[True, True, False]]])]
    first, second = AgreedLayers().agree(scores, positions, valid)
    assert first.tolist() == [[[1.0, 3.5, 5.0]]]
    assert second[..., :2].tolist() == [[[3.5, 5.0]]]


def test_heads_and_sequences_are_apart() -> None:
    scores = [torch.rand(2, 3, 6) for _ in range(4)]
    positions, valid = torch.arange(6).expand(2, 3, 6), torch.ones(2, 3, 6, dtype=torch.bool)
    found = AgreedLayers().agree(scores, [positions] * 4, [valid] * 4)
    for x in found:
        torch.testing.assert_close(x, torch.stack(scores).mean(dim=0))


def test_every_layer_gets_the_mean_and_others_keep_their_scores() -> None:
    per_head = torch.tensor([5, 6])
    assert all(torch.equal(x, per_head) for x in AgreedLayers().share([torch.rand(2, 2, 9)] * 3, per_head))
    scores = [torch.rand(1, 1, 3), torch.rand(1, 1, 3)]
    assert PoolLayers().agree(scores, [], []) == scores


def test_layers_with_other_heads_are_refused() -> None:
    scores = [torch.rand(1, 2, 3), torch.rand(1, 3, 3)]
    with pytest.raises(RecipeError, match="2 and 3 KV heads"):
        AgreedLayers().agree(scores, [], [])
