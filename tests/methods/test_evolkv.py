"""EvolKV's specification, one test a line of "How to check an implementation"; objective and search are in tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import config, text
from tests.reading import deep, held, read
from transformers import PreTrainedModel

from kvthrift import Cache, ModelMismatchError, Recipe, RecipeError, method
from kvthrift.allocate import BudgetLayers
from kvthrift.integrations.transformers.facts import config_fingerprint

ENTRIES = (90, 20, 60, 30)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep(4)


@pytest.fixture
def file(tmp_path: Path, model: PreTrainedModel) -> str:
    found = method("snapkv", budget=50, window=8)
    listed = found.with_options(layers=BudgetLayers(ENTRIES, config_fingerprint(model.config)))
    listed.save(tmp_path / "best.toml")
    return str(tmp_path / "best.toml")


def counts(cache: Cache) -> list[set[int]]:
    return [{len(head) for head in layer} for layer in held(cache)]


def test_each_layer_keeps_what_is_listed_in_all_its_heads(model: PreTrainedModel, file: str) -> None:
    cache = read(model, text(1, 150), method("evolkv", budget=50, window=8, table=file))
    assert counts(cache) == [{count} for count in ENTRIES]


def test_the_list_found_at_one_budget_serves_another(model: PreTrainedModel, file: str) -> None:
    """Completion: k * A / B, the same order, exactly the total."""
    cache = read(model, text(1, 300), method("evolkv", budget=100, window=8, table=file))
    assert counts(cache) == [{2 * count} for count in ENTRIES]


def test_a_layer_keeps_what_snapkv_would_with_that_layers_budget(model: PreTrainedModel, file: str) -> None:
    ids = text(1, 150)
    ours = held(read(model, ids, method("evolkv", budget=50, window=8, table=file)))
    for layer, count in enumerate(ENTRIES):
        assert ours[layer] == held(read(model, ids, method("snapkv", budget=count, window=8)))[layer]


@pytest.mark.parametrize("prompt", [49, 50, 51, 150])
def test_a_uniform_list_is_the_base_selector(model: PreTrainedModel, prompt: int, tmp_path: Path) -> None:
    found = method("snapkv", budget=50, window=8).with_options(layers=BudgetLayers((7,) * 4))
    found.save(tmp_path / "uniform.toml")
    ids = text(1, prompt)
    ours = read(model, ids, method("evolkv", budget=50, window=8, table=str(tmp_path / "uniform.toml")))
    plain = read(model, ids, method("snapkv", budget=50, window=8))
    assert held(ours) == held(plain)
    with torch.inference_mode():
        logits = [model(input_ids=ids[:, -1:], past_key_values=cache).logits for cache in (ours, plain)]
    assert torch.equal(*logits)


def test_where_every_layer_has_room_the_full_cache_is_left(model: PreTrainedModel, file: str) -> None:
    """k' >= n for all layers; and a layer that has room keeps all, while what it leaves goes to no other."""
    ids = text(1, 80)
    ours = read(model, ids, method("evolkv", budget=200, window=8, table=file))  # the smallest layer has 80
    whole = read(model, ids, method("full"))
    assert held(ours) == held(whole)
    assert counts(read(model, text(1, 85), method("evolkv", budget=50, window=8, table=file)))[:2] == [{85}, {20}]


def test_a_layer_below_the_window_gets_the_window(model: PreTrainedModel, file: str) -> None:
    found = counts(read(model, text(1, 150), method("evolkv", budget=50, window=32, table=file)))
    assert found[1] == {32}
    assert sum(min(layer) for layer in found) == 4 * 50


def test_another_model_is_refused(file: str) -> None:
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama"), "evolkv", budget=64, table=file)
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama"), "evolkv", budget=64)


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither shipped for evolkv \(shipped: .*kvthrift tune"):
        method("evolkv", table="llama-9")
    method("snapkv", budget=64).save(tmp_path / "plain.toml")
    with pytest.raises(RecipeError, match=r"lists no budgets of layers \(layers=uniform\)"):
        method("evolkv", table=str(tmp_path / "plain.toml"))


def test_the_shipped_list_is_no_pyramid() -> None:
    """Found lists are not monotone in depth; this one is the embedded model's, and its mean is what it was found at."""
    found = method("evolkv").layers
    assert isinstance(found, BudgetLayers)
    assert len(found.entries) == 30
    assert list(found.entries) not in (sorted(found.entries), sorted(found.entries, reverse=True))
    assert min(found.entries) >= 32
    assert Recipe.from_plain(method("evolkv", budget=64).plain()) == method("evolkv", budget=64)
