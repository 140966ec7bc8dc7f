"""Parts on CUDA keep what they keep on the CPU: retrieval heads, groups, segments, semantic heads."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from tests.fitted import DELIMITERS, fitted
from tests.models import text, tiny
from tests.reading import held
from transformers import PreTrainedModel

from kvthrift import method, prefill

pytestmark = pytest.mark.gpu


@cache
def cuda() -> PreTrainedModel:
    """The tiny model of the other tests, on CUDA."""
    return copy.deepcopy(tiny("llama")).to("cuda")


@pytest.mark.parametrize("name", ["compresskv", "uncomp", "sablock", "task_kv"])
def test_the_same_entries_as_on_the_cpu(name: str) -> None:
    recipe, ids = fitted(method(name, budget=48)), text(2, 180)
    cpu = prefill(tiny("llama"), ids, recipe, page=16, delimiters=DELIMITERS)
    gpu = prefill(cuda(), ids.to("cuda"), recipe, page=16, delimiters=DELIMITERS)
    gpu.check_integrity()
    assert gpu.report().entries == cpu.report().entries
    pairs = [(a, b) for x, y in zip(held(cpu), held(gpu), strict=True) for a, b in zip(x, y, strict=True)]
    differ = sum(len(set(a) ^ set(b)) for a, b in pairs)
    assert differ <= 0.02 * sum(len(a) for a, _ in pairs)  # scores differ in the last bits
