"""PyramidKV's specification, one test a line of "How to check an implementation"; the schedule's are in allocate."""

from __future__ import annotations

import pytest
import torch
from tests.models import text
from tests.reading import deep, held, read
from transformers import PreTrainedModel

from kvthrift import method
from kvthrift.allocate import UniformLayers

LAYERS, C, W = 6, 40, 8


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep(LAYERS)


def counts(model: PreTrainedModel, prompt: int, **options: object) -> list[int]:
    cache = read(model, text(1, prompt), method("pyramidkv", budget=C, window=W, **options))
    found = [[len(head) for head in layer] for layer in held(cache)]
    assert all(len(set(layer)) == 1 for layer in found)  # the same count in all heads of a layer
    return [layer[0] for layer in found]


def test_a_prompt_below_the_budget_is_left_as_it_is_in_every_layer(model: PreTrainedModel) -> None:
    """n < C."""
    ids = text(1, C)
    caches = [read(model, ids[:, :-1], recipe) for recipe in (method("pyramidkv", budget=C, window=W), method("full"))]
    assert held(caches[0]) == held(caches[1])
    with torch.inference_mode():
        ours, whole = (model(input_ids=ids[:, -1:], past_key_values=c).logits for c in caches)
    assert torch.equal(ours, whole)


@pytest.mark.parametrize("published", [False, True])
def test_regimes_at_twice_the_budget_without_its_window(model: PreTrainedModel, published: bool) -> None:
    """n = 2(C - w) - 1 keeps exactly C everywhere; n = 2(C - w) switches, clamped to n - w where that is less."""
    edge = 2 * (C - W)
    assert counts(model, edge - 1, published_rounding=published) == [C] * LAYERS
    switched = counts(model, edge, published_rounding=published)
    assert switched[0] == edge  # min 1 < w: clamped to n - w, so that the first layer keeps everything
    assert switched[-1] < C
    assert switched == sorted(switched, reverse=True)


def test_a_long_prompt_follows_the_published_schedule_or_the_exact_total(model: PreTrainedModel) -> None:
    published = counts(model, 150, published_rounding=True)
    step = (63 - 1) // 5  # max = 2 * 32 - 1, min = 32 // 20
    assert published == [63 - step * layer + W for layer in range(LAYERS)]
    exact = counts(model, 150)
    assert sum(exact) == LAYERS * C
    assert exact[0] == published[0]
    assert exact == sorted(exact, reverse=True)


def test_beta_of_one_is_snapkv() -> None:
    """With one query head per KV head, where it does not matter when the group is joined."""
    model, ids = deep(3, num_key_value_heads=4), text(1, 150)
    pyramid = read(model, ids, method("pyramidkv", budget=C, window=W, beta=1))
    snap = read(model, ids, method("snapkv", budget=C, window=W))
    assert held(pyramid) == held(snap)


@pytest.mark.parametrize("prompt", [64, 150])
def test_a_layer_keeps_what_snapkv_would_with_that_layers_budget(model: PreTrainedModel, prompt: int) -> None:
    ids = text(1, prompt)
    pyramid = held(read(model, ids, method("pyramidkv", budget=C, window=W)))
    for layer, found in enumerate(pyramid):
        alone = method("pyramidkv", budget=len(found[0]), window=W).with_options(layers=UniformLayers())
        assert held(read(model, ids, alone))[layer] == found


def test_the_published_totals_at_32_layers() -> None:
    """C = 128: 4016 past entries a head in all; the exact schedule gives 3840."""
    model = deep(32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    for published, total in ((True, 4016), (False, 3840)):
        recipe = method("pyramidkv", budget=128, window=8, published_rounding=published)
        found = held(read(model, text(1, 300), recipe))
        assert sum(len(layer[0]) for layer in found) == total + 32 * 8
