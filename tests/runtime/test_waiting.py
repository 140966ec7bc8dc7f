"""A prompt is compressed without waiting for the device, where the host can know beforehand how much will stay.

Waits are found by what asks for them: numbers that are read, and shapes that depend on numbers. On a CPU nothing is
waited for, but the same calls are made; twins of kernels, which no GPU runs, do not count.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import text, tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kvthrift
from kvthrift import Recipe, method
from kvthrift.allocate import GroupHeads, PyramidLayers

ROOT = str(Path(kvthrift.__file__).parent)
ASKING = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.nonzero,
    torch.nonzero, torch.equal, Tensor.equal, torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique,
}  # fmt: skip


class Waits(TorchFunctionMode):
    """The places of the package that ask the device for something."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        known = {torch.equal, Tensor.tolist}  # of two rotary embeddings, of budgets: these are on the host
        if func in ASKING or (func is Tensor.__getitem__ and _masks(args[1])):
            place = _place()
            if place and not (func in known and ("agree.py" in place or "layers.py" in place)):
                self.places.append(f"{place} {func.__name__}")
        return func(*args, **(kwargs or {}))


def _masks(index: Any) -> bool:
    parts: Iterable[Any] = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _place() -> str | None:
    """Where the package is, if it is not within a twin."""
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
    if not ours or any("/kernels/naive" in frame.filename for frame in ours):
        return None
    last = ours[-1]
    if last.filename.endswith(("/prefill.py", "/sound.py")):  # of keys on a GPU the latter asks later
        return None
    return f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"


def waits(recipe: Recipe, *, chunk: int | None = None, batch: int = 2) -> tuple[list[str], kvthrift.Cache]:
    with Waits() as found:
        cache = kvthrift.prefill(tiny("llama"), text(batch, 130), recipe, page=16, chunk=chunk)
    return found.places, cache


UNIFORM = [method(name, budget=40) for name in ("snapkv", "expected_attention", "h2o", "streamingllm", "tova", "knorm")]
TOLD = [
    *UNIFORM,
    method("keydiff", budget=40),
    method("criticalkv", budget=40),
    method("snapkv", budget=40).with_options(layers=PyramidLayers()),
    method("snapkv", budget=40, merge="fold"),
    method("snapkv", budget=40).with_options(heads=GroupHeads(sizes=(30.0, 50.0), protected=32), name="groups"),
    method("full"),
]


@pytest.mark.parametrize("recipe", TOLD, ids=str)
@pytest.mark.parametrize("chunk", [None, 70])
def test_what_the_host_can_know_it_does_not_ask_for(recipe: Recipe, chunk: int | None) -> None:
    found, cache = waits(recipe, chunk=chunk)
    assert found == []
    assert cache.report().entries > 0


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "h2o", "full"])
def test_a_padded_batch_is_asked_for_its_mask_and_nothing_else(name: str) -> None:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, :41] = 0
    with Waits() as found:
        size = {} if name == "full" else {"budget": 40}
        cache = kvthrift.prefill(tiny("llama"), text(2, 130), name, page=16, attention_mask=mask, **size)
    assert [place.split(" ")[0].split(":")[0] for place in found.places] == ["attention.py"]
    cache.check_integrity()


def test_the_instrument_sees_those_who_ask() -> None:
    found = {place.split(" ")[1] for place in waits(method("chunkkv", budget=40))[0]}
    found |= {place.split(" ")[1] for place in waits(method("adakv", budget=40, blend=0.5))[0]}
    assert {"__bool__", "equal", "nonzero", "cpu", "tolist"} <= found


def test_heads_that_compete_are_asked_for_once_a_pass() -> None:
    found, cache = waits(method("adakv", budget=40))
    assert [place.split(" ")[1] for place in found] == ["cpu"]
    assert found[0].startswith("table.py")
    assert cache.report().entries == 2 * 2 * 2 * 40
    cache.check_integrity()


def test_a_decode_step_asks_for_nothing() -> None:
    for name in ("snapkv", "adakv"):
        cache = kvthrift.prefill(tiny("llama"), text(2, 130), name, budget=40, page=16)
        with Waits() as found, torch.no_grad():
            tiny("llama")(input_ids=text(2, 1), past_key_values=cache)
        assert found.places == []
