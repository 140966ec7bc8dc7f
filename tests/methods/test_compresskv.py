"""CompressKV's specification, one test a line of "How to check an implementation", and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fitted import fitted
from tests.models import config, text, tiny
from tests.reading import deep, held, read
from tests.views import keep, layer_view, view_rows
from torch import Tensor
from transformers import PreTrainedConfig

from kvthrift import BudgetError, Cache, CalibrationError, ModelMismatchError, OptionError, Recipe, method
from kvthrift.allocate import TableLayers
from kvthrift.allocate.table import layer_budgets
from kvthrift.calibrate import Meta, load_named, save
from kvthrift.calibrate.retrieval import KIND, tables
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.score import ChosenHeads
from kvthrift.score.window import smooth

LENGTH = 300
HEADS = torch.tensor([[3, 1, 0, 2], [2, 0, 1, 3]])
PUBLISHED = {0: (11, 25, 23, 27), 13: (6, 4, 21, 18), 14: (29, 13, 31, 22), 31: (21, 20, 30, 7)}  # of Llama-3.1-8B


def table_file(folder: Path, made: PreTrainedConfig, heads: Tensor = HEADS, errors: Tensor | None = None) -> str:
    meta = Meta(KIND, "compresskv", config_fingerprint(made), "llama", len(heads), int(made.num_key_value_heads), {})
    errors = torch.full((len(heads),), 1 / len(heads)) if errors is None else errors
    save(folder / "table.safetensors", {"heads": heads, "layer_error": errors}, meta, force=True)
    return str(folder / "table.safetensors")


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [((0.1, 0.2, 0.3, 0.4), [70, 109, 147, 186]), ((0.0, 0.0, 0.1, 0.9), [32, 32, 70, 378])],
)
def test_allocation_of_four_layers_at_128(shares: tuple[float, ...], wanted: list[int]) -> None:
    found = layer_budgets(np.array(shares), 128)
    assert found.tolist() == wanted
    assert found.sum() == 512


def test_published_errors_give_83_to_350_tokens_at_256() -> None:
    """The smallest published error is that of layer 31, the largest that of layer 8; the others share the rest."""
    counts = np.array([227] * 19 + [226] * 13)
    counts[8], counts[19], counts[31] = 318, 227, 51
    shares = counts / 7168
    assert (round(shares[8], 3), round(shares[31], 3)) == (0.044, 0.007)
    found = layer_budgets(shares, 256)
    assert (found.argmin(), found.min(), found.argmax(), found.max()) == (31, 83, 8, 350)
    assert found.sum() == 8192


@pytest.mark.parametrize("mean", [8, 31, 32, 33, 64, 257])
@pytest.mark.parametrize("seed", range(4))
def test_budgets_add_up_within_floor_and_cap(mean: int, seed: int) -> None:
    shares = np.random.default_rng(seed).exponential(size=13) ** (1 + 2 * seed)
    found = layer_budgets(shares, mean)
    assert found.sum() == 13 * mean
    assert found.min() >= min(32, mean)
    assert found.max() <= 3 * mean


def test_a_capped_layer_gives_to_the_next_by_error() -> None:
    found = layer_budgets(np.array([0.0, 0.0, 0.0, 1.0]), 40, most=1.5)
    assert found.tolist() == [34, 33, 33, 60]


def test_the_recipe_keeps_the_same_positions_in_all_kv_heads(tmp_path: Path) -> None:
    model = deep(4)
    heads = torch.stack([torch.randperm(4) for _ in range(4)])
    errors = torch.tensor([0.1, 0.2, 0.3, 0.4])
    recipe = method("compresskv", calibration=table_file(tmp_path, model.config, heads, errors), budget=128, heads=2)
    found = held(read(model, text(1, LENGTH), recipe))
    assert [len(layer[0]) for layer in found] == [70, 109, 147, 186]
    for layer in found:
        assert layer == [layer[0]] * 2
        assert layer[0][-8:] == list(range(LENGTH - 8, LENGTH))


def test_all_heads_are_head_averaged_snapkv() -> None:
    view = layer_view(heads=3, group=2, entries=90, window=8)
    score = ChosenHeads(count=6).score(view)
    rows = view_rows(view).float()[..., :-8].sum(dim=3)
    wanted = smooth(rows, "avg", 5).mean(dim=(1, 2))
    torch.testing.assert_close(score[..., :-8], wanted[:, None].expand(1, 3, -1), rtol=1e-4, atol=1e-6)
    assert not score[..., -8:].any()


def test_only_the_chosen_heads_count() -> None:
    view = layer_view(heads=3, group=2, entries=90, window=8, layer=1)
    table = ((0, 1), (4, 3), (0, 1), (0, 1))
    score = ChosenHeads(table, count=2).score(view)
    rows = view_rows(view).float()[..., :-8].sum(dim=3).flatten(1, 2)
    wanted = smooth(rows[:, [4, 3]], "avg", 5).mean(dim=1)
    torch.testing.assert_close(score[:, 0, :-8], wanted, rtol=1e-4, atol=1e-6)


def test_heads_that_hold_different_tokens_score_by_token() -> None:
    view = layer_view(heads=2, group=1, lengths=[[40, 25]], seen=60, window=8)
    score = ChosenHeads(count=2, pool="none").score(view)
    rows = view_rows(view).float().sum(dim=3)[0, :, 0]  # [H, T]
    given = [
        dict(zip(view.positions[0, h, :n].tolist(), rows[h].tolist(), strict=False)) for h, n in ((0, 32), (1, 17))
    ]
    for h, count in ((0, 32), (1, 17)):
        for n in range(count):
            place = int(view.positions[0, h, n])
            wanted = sum(found.get(place, 0.0) for found in given) / 2
            assert float(score[0, h, n]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_published_head_lists_are_read_as_query_heads_of_their_kv_heads(tmp_path: Path) -> None:
    made = config("llama", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=128)
    rows = [[*PUBLISHED.get(n, ()), *(h for h in range(32) if h not in PUBLISHED.get(n, ()))] for n in range(32)]
    recipe = method("compresskv", calibration=table_file(tmp_path, made, torch.tensor(rows)), budget=256)
    for layer, wanted in PUBLISHED.items():
        view = layer_view(heads=8, group=4, entries=64, window=8, layer=layer, layers=32)
        scorer = recipe.scorer
        assert isinstance(scorer, ChosenHeads)
        assert tuple(scorer.heads(view)) == wanted
        rows_ = view_rows(view).float()[..., :-8].sum(dim=3).flatten(1, 2)[:, list(wanted)]
        torch.testing.assert_close(
            scorer.score(view)[:, 0, :-8], smooth(rows_, "avg", 5).mean(dim=1), rtol=1e-4, atol=1e-6
        )
    Cache(made, recipe)


def test_budgets_of_all_layers_above_the_length_keep_everything(tmp_path: Path) -> None:
    recipe = method("compresskv", calibration=table_file(tmp_path, config("llama")), budget=100)
    assert held(read(tiny("llama"), text(1, 100), recipe)) == [[list(range(100))] * 2] * 2


def test_a_layer_with_more_room_than_text_keeps_all_and_passes_nothing_on(tmp_path: Path) -> None:
    errors = torch.tensor([0.9, 0.1])
    recipe = method("compresskv", calibration=table_file(tmp_path, config("llama"), errors=errors), budget=100)
    found = held(read(tiny("llama"), text(1, 120), recipe))
    assert [len(layer[0]) for layer in found] == [120, 200 - 154]


def test_uniform_is_the_same_for_every_layer(tmp_path: Path) -> None:
    file = table_file(tmp_path, config("llama"), errors=torch.tensor([0.9, 0.1]))
    found = held(read(tiny("llama"), text(1, LENGTH), method("compresskv", calibration=file, budget=64, uniform=True)))
    assert [len(layer[0]) for layer in found] == [64, 64]


def test_the_table_follows_the_models_numbers_where_layers_are_whole(tmp_path: Path) -> None:
    model = deep(3)
    errors = torch.tensor([0.2, 0.7, 0.1])
    file = table_file(tmp_path, model.config, torch.arange(4).repeat(3, 1), errors)
    found = held(read(model, text(1, LENGTH), method("compresskv", calibration=file, budget=64, skip=(1,))))
    shares = layer_budgets(np.array([0.2, 0.1]), 64)
    assert [len(layer[0]) for layer in found] == [shares[0], LENGTH, shares[1]]


def test_sequences_choose_for_themselves() -> None:
    recipe = fitted(method("compresskv"))
    view = layer_view(batch=2, heads=2, group=2, entries=90, window=8, layers=2)
    found = keep(recipe, view, 50)
    assert not torch.equal(found[0], found[1])


def test_the_shipped_table_is_one_of_the_embedded_model() -> None:
    shipped = load_named("smollm2", method="compresskv", kind=KIND)
    heads, errors = tables(shipped)
    assert (len(heads), len(heads[0]), len(errors)) == (30, 9, 30)
    assert sum(errors) == pytest.approx(1.0, abs=1e-5)
    assert shipped.meta.provenance["found"] >= shipped.meta.provenance["samples"] / 2
    assert "chosen_heads(4 of 30 layers" in str(method("compresskv"))


def test_the_recipe_holds_its_tables(tmp_path: Path) -> None:
    recipe = method("compresskv", budget=64)
    for name in ("a.toml", "a.json"):
        recipe.save(tmp_path / name)
        assert Recipe.load(tmp_path / name) == recipe


# -- bad input ------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_when_the_cache_is_made(tmp_path: Path) -> None:
    file = table_file(tmp_path, config("llama"))
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama", num_hidden_layers=3), "compresskv", budget=64, calibration=file)
    with pytest.raises(ModelMismatchError, match="kvthrift calibrate"):
        Cache(config("llama"), "compresskv", budget=64)


def test_tables_of_other_sizes_are_refused() -> None:
    view = layer_view(heads=2, group=2, entries=60, window=8, layer=3)
    with pytest.raises(ModelMismatchError, match="1 layers of 4 query heads, but this model has at least 4 of 4"):
        ChosenHeads(((0, 1, 2, 3),)).score(view)
    with pytest.raises(ModelMismatchError, match="of 8 query heads"):
        ChosenHeads(((7,),) * 4).score(view)
    with pytest.raises(ModelMismatchError, match="2 layers, but this model has at least 4"):
        TableLayers((0.5, 0.5)).total(view, torch.tensor([64]), 8)


@pytest.mark.parametrize(
    ("heads", "errors", "said"),
    [
        (HEADS[:, :3], None, "are not those of"),
        (torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]), None, "every query head of a layer once"),
        (HEADS, torch.tensor([0.5, float("nan")]), "not finite"),
        (HEADS, torch.tensor([0.5, 0.3, 0.2]), "are not those of"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, heads: Tensor, errors: Tensor | None, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        method("compresskv", calibration=table_file(tmp_path, config("llama"), heads, errors))


def test_a_damaged_file_or_one_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = Path(table_file(tmp_path, config("llama")))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CalibrationError, match="damaged"):
        method("compresskv", calibration=str(file))
    with pytest.raises(CalibrationError, match="neither a file nor shipped"):
        method("compresskv", calibration="llama-9")


def test_a_budget_below_the_window_is_refused(tmp_path: Path) -> None:
    file = table_file(tmp_path, config("llama"))
    with pytest.raises(BudgetError, match="always keeps 0 sinks and 8 recent"):
        Cache(config("llama"), "compresskv", budget=7, calibration=file)
    found = held(read(tiny("llama"), text(1, 100), method("compresskv", budget=20, calibration=file)))
    assert [len(layer[0]) for layer in found] == [20, 20]  # below the floor: the same for all


@pytest.mark.parametrize(("name", "value"), [("heads", 0), ("kernel", 4), ("most", 0.5), ("least", -1)])
def test_options_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match="count" if name == "heads" else name):
        method("compresskv", **{name: value})
