"""Recipes on CUDA, where kernels score, keep what they keep on the CPU, where their naive twins do."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tests.models import text, tiny
from tests.reading import held
from transformers import PreTrainedModel

from kvthrift import Recipe, method, prefill

pytestmark = pytest.mark.gpu


@cache
def cuda() -> PreTrainedModel:
    """The tiny model of the other tests, on CUDA."""
    return copy.deepcopy(tiny("llama")).to("cuda")


def recipes() -> list[Recipe]:
    names = ("snapkv", "adakv", "cake", "expected_attention", "h2o", "kv_compress", "criticalkv")
    return [
        *(method(name, budget=48) for name in names),
        method("h2o", budget=48, products="int8").with_options(name="h2o int8"),
    ]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("chunk", [None, 70])
def test_the_same_entries_as_on_the_cpu(recipe: Recipe, chunk: int | None) -> None:
    ids, mask = text(2, 180), torch.ones(2, 180, dtype=torch.long)
    mask[1, :37] = 0
    cpu = prefill(tiny("llama"), ids, recipe, page=16, attention_mask=mask, chunk=chunk)
    gpu = prefill(cuda(), ids.to("cuda"), recipe, page=16, attention_mask=mask.to("cuda"), chunk=chunk)
    gpu.check_integrity()
    assert gpu.report().entries == cpu.report().entries
    pairs = [(a, b) for x, y in zip(held(cpu), held(gpu), strict=True) for a, b in zip(x, y, strict=True)]
    differ = sum(len(set(a) ^ set(b)) for a, b in pairs)
    assert differ <= 0.02 * sum(len(a) for a, _ in pairs)  # scores differ in the last bits
