"""HeadKV: budgets follow the calibrated table, their mean is what was asked for, another model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import config, text, tiny
from tests.reading import deep, held, read
from torch import Tensor
from transformers import PreTrainedConfig

from kvthrift import Cache, CalibrationError, ModelMismatchError, OptionError, Recipe, RecipeError, method, prefill
from kvthrift.allocate import (
    EntropyLayers,
    LayerAllocator,
    LossStop,
    PreferenceLayers,
    PyramidLayers,
    TableHeads,
    TableLayers,
)
from kvthrift.calibrate import Meta, load_named, save
from kvthrift.calibrate.heads import KIND
from kvthrift.integrations.transformers.facts import config_fingerprint

LENGTH = 300
TABLE = torch.tensor([[0.5, 0.1], [0.0, 0.4]])


def table_file(folder: Path, table: Tensor, made: PreTrainedConfig) -> str:
    meta = Meta(KIND, "headkv", config_fingerprint(made), "llama", len(table), table.shape[1], {})
    save(folder / "table.safetensors", {"importance": table}, meta)
    return str(folder / "table.safetensors")


def lengths(cache: Cache) -> list[list[int]]:
    return [[len(head) for head in layer] for layer in held(cache)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return table_file(tmp_path, TABLE, config("llama"))


@pytest.mark.parametrize("beta", [1.005, 1.01, 1.1, 1.2, 1.5, 2, 5, 10])
@pytest.mark.parametrize("budget", [40, 64, 128])
def test_the_mean_is_the_budget_and_budgets_follow_the_table(file: str, budget: int, beta: float) -> None:
    recipe = method("headkv", budget=budget, calibration=file, beta=beta, window=16)
    found = torch.tensor(lengths(read(tiny("llama"), text(1, LENGTH), recipe)))
    assert found.sum() == budget * found.numel()
    pooled = int((budget - 16) / beta)
    wanted = (budget - pooled) + pooled * 4 * TABLE / TABLE.sum()
    if wanted.max() <= LENGTH:
        assert (found - wanted).abs().max() < 1
    assert found.min() >= 16


@pytest.mark.parametrize("beta", [1.005, 1.2, 10])
def test_a_constant_table_keeps_what_snapkv_keeps(tmp_path: Path, beta: float) -> None:
    model = deep(3)
    file = table_file(tmp_path, torch.full((3, 2), 0.7), model.config)
    ours = read(model, text(1, LENGTH), method("headkv", budget=64, calibration=file, beta=beta))
    plain = read(model, text(1, LENGTH), method("snapkv", budget=64))
    assert lengths(ours) == [[64, 64]] * 3
    assert held(ours) == held(plain)


def test_what_a_short_text_cannot_fill_goes_to_other_heads(file: str) -> None:
    recipe = method("headkv", budget=64, calibration=file, beta=1.005, window=16)
    found = lengths(read(tiny("llama"), text(1, 80), recipe))
    assert sum(map(sum, found)) == 64 * 4
    assert found[0][0] == 80


def test_a_text_within_the_budget_stays_whole(file: str) -> None:
    cache = read(tiny("llama"), text(1, 64), method("headkv", budget=64, calibration=file))
    assert lengths(cache) == [[64, 64]] * 2


def test_every_sequence_of_a_padded_batch_gets_the_table(file: str) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :100] = 0
    recipe = method("headkv", budget=64, calibration=file, window=16)
    cache = prefill(tiny("llama"), text(2, LENGTH), recipe, attention_mask=mask)
    stores = [layer.store for layer in cache.state.layers if layer.store is not None]
    assert [store.lengths.tolist()[0] for store in stores] == [store.lengths.tolist()[1] for store in stores]


def test_rows_of_skipped_layers_are_not_shared_out(tmp_path: Path) -> None:
    model = deep(4)
    table = torch.tensor([[9.0, 9.0], [0.2, 0.0], [9.0, 9.0], [0.1, 0.1]])
    file = table_file(tmp_path, table, model.config)
    recipe = method("headkv", budget=64, calibration=file, beta=1.5, window=16, skip=(0, 2))
    found = lengths(read(model, text(1, LENGTH), recipe))
    assert found[0] == found[2] == [LENGTH] * 2
    assert found[1] == [32 + 64, 32]
    assert found[3] == [32 + 32] * 2


def test_sliding_layers_have_rows_of_their_own(tmp_path: Path) -> None:
    made = config("gemma3")
    table = torch.tensor([[0.0, 0.0], [0.3, 0.1], [0.0, 0.0], [0.1, 0.1]])
    recipe = method("headkv", budget=64, calibration=table_file(tmp_path, table, made), beta=1.5, window=16)
    found = lengths(read(tiny("gemma3"), text(1, LENGTH), recipe))
    assert found == [[32 + 64, 32 + 22], [32 + 21, 32 + 21]]  # 128 by 3 : 1 : 1 : 1, the odd ones to the first


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 3}, {"num_key_value_heads": 1}, {"hidden_size": 32}, {"vocab_size": 300}]
)
def test_another_model_is_refused_when_the_cache_is_made(file: str, changes: dict[str, int]) -> None:
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama", **changes), "headkv", budget=64, calibration=file)


def test_the_shipped_table_is_refused_by_another_model() -> None:
    with pytest.raises(ModelMismatchError, match="kvthrift calibrate"):
        Cache(config("llama"), "headkv", budget=64)


def test_other_weights_and_dtypes_of_the_same_config_are_accepted(file: str) -> None:
    other = tiny("llama", seed=1)
    assert lengths(read(other, text(1, LENGTH), method("headkv", budget=64, calibration=file)))
    made = config("llama")
    made.dtype = torch.bfloat16
    Cache(made, "headkv", budget=64, calibration=file)


def test_a_table_whose_sizes_are_not_the_models_is_refused(tmp_path: Path) -> None:
    model = deep(2, num_key_value_heads=4)
    recipe = method("headkv", budget=64, calibration=table_file(tmp_path, TABLE, model.config))
    with pytest.raises(ModelMismatchError, match="2 layers of 2 KV heads"):
        read(model, text(1, LENGTH), recipe)


def test_the_recipe_holds_its_table(file: str, tmp_path: Path) -> None:
    recipe = method("headkv", budget=64, calibration=file)
    for name in ("a.toml", "a.json"):
        recipe.save(tmp_path / name)
        assert Recipe.load(tmp_path / name) == recipe
    assert "table(2 x 2 heads, beta=1.2)" in str(recipe)


def test_the_shipped_table_is_one_of_importance() -> None:
    shipped = load_named("smollm2", method="headkv", kind=KIND)
    table = shipped.tensors["importance"]
    assert table.shape == (30, 3)
    assert float(table.sum()) == pytest.approx(1.0)
    assert shipped.meta.provenance["counted"] > 0.8 * shipped.meta.provenance["steps"]
    assert float(table.flatten().sort(descending=True).values[:9].sum()) > 0.5  # a tenth of the heads, half of it


@pytest.mark.parametrize(("name", "value"), [("beta", 0.9), ("beta", "two"), ("window", 0), ("kernel", 4)])
def test_options_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        method("headkv", **{name: value})


def test_an_unknown_calibration_is_refused() -> None:
    with pytest.raises(CalibrationError, match="neither a file nor shipped"):
        method("headkv", calibration="llama-9")


def test_decoding_stays_within_the_budget_of_all_heads_together(tmp_path: Path) -> None:
    model = deep(4)
    table = torch.tensor([[9.0, 3.0], [0.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    file = table_file(tmp_path, table, model.config)
    cache = read(model, text(1, LENGTH), method("headkv", budget=64, every=16, window=16, calibration=file))
    with torch.inference_mode():
        for token in range(1, 60):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            assert sum(map(sum, lengths(cache))) <= (64 + 16) * table.numel()


UNEQUAL = (PyramidLayers(), TableLayers((0.7, 0.1, 0.1, 0.1), 8), PreferenceLayers(8), EntropyLayers(), LossStop(0.2))


@pytest.mark.parametrize("layers", UNEQUAL, ids=lambda part: part.name)
def test_with_layers_of_unequal_budgets_heads_compete_within_a_layer_or_are_refused(layers: LayerAllocator) -> None:
    """Over the whole model, each layer would share out its own budget as if it were every layer's."""
    table = ((9.0, 1.0), (8.0, 2.0), (1.0, 1.0), (0.5, 0.5))
    plain = method("snapkv", window=8, budget=48).with_options(layers=layers)
    with pytest.raises(RecipeError, match=f"heads=table shares room out over all layers, but layers={layers.name} giv"):
        plain.with_options(heads=TableHeads(table, 1.05, 8))
    recipe = plain.with_options(heads=TableHeads(table, 1.05, 8, within="layer"))
    model, ids = deep(4), text(1, LENGTH)
    ours = lengths(read(model, ids, recipe))
    assert list(map(sum, ours)) == list(map(sum, lengths(read(model, ids, plain))))  # each layer its own room
    assert ours[0][0] > ours[0][1]
