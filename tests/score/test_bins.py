"""A bias by head and bin of positions: added where an entry stands, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import config, text, tiny
from tests.reading import held, read
from tests.views import layer_view
from torch import Tensor

from kvthrift import Cache, CalibrationError, ModelMismatchError, OptionError, Recipe, method
from kvthrift.calibrate import Artefact, Meta, load, save
from kvthrift.calibrate.bins import KIND, biases, bin_means
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.score import AttentionReceived, KeyNorm, PositionBias

EDGES = (0, 10, 25)
TABLE = tuple(tuple(tuple(float(100 * n + 10 * h + b) for b in range(3)) for h in range(2)) for n in range(4))


def test_every_entry_gets_its_heads_number_for_its_bin() -> None:
    view = layer_view(batch=2, heads=2, lengths=[[40, 17], [5, 30]], seen=60, layer=2)
    base = KeyNorm()
    found = PositionBias(base, EDGES, TABLE, weight=0.5).score(view) - base.score(view)
    for b in range(2):
        for h in range(2):
            for n in range(int(view.lengths[b, h])):
                place = int(view.positions[b, h, n])
                wanted = TABLE[2][h][0 if place < 10 else 1 if place < 25 else 2]
                assert float(found[b, h, n]) == pytest.approx(wanted / 2, abs=1e-3)


def test_rows_are_the_models_own_numbers() -> None:
    view = layer_view(heads=2, layer=1, layers=2)
    view.numbers = (1, 3)
    base = KeyNorm()
    more = PositionBias(base, (0,), tuple(tuple(row[:1] for row in layer) for layer in TABLE)).score(view)
    torch.testing.assert_close(more - base.score(view), torch.tensor([300.0, 310.0])[None, :, None].expand(1, 2, 40))


def test_no_weight_and_no_table_are_the_base() -> None:
    view = layer_view(heads=2)
    for scorer in (PositionBias(KeyNorm(), EDGES, TABLE, weight=0.0), PositionBias(KeyNorm())):
        assert torch.equal(scorer.score(view), KeyNorm().score(view))
    assert PositionBias(AttentionReceived()).needs == AttentionReceived().needs


def test_it_can_be_written_down() -> None:
    recipe = Recipe("x", PositionBias(KeyNorm(), EDGES, TABLE, 2.0, "abc"))
    assert Recipe.from_plain(recipe.plain()) == recipe
    assert recipe.scorer.model == "abc"
    assert "4 layers of 3 bins, weight=2" in str(recipe)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"edges": (1, 2)}, "must rise, and begin with 0"),
        ({"edges": (0, 5, 5)}, "must rise, and begin with 0"),
        ({"edges": (0, 5), "bias": TABLE}, "2 finite numbers for every head"),
        ({"edges": (0,), "bias": (((float("inf"),),),)}, "1 finite numbers for every head"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        PositionBias(KeyNorm(), **options)  # type: ignore[arg-type]


def test_tables_of_other_sizes_are_refused() -> None:
    for view in (layer_view(heads=3), layer_view(heads=2, layer=4, layers=5)):
        with pytest.raises(ModelMismatchError, match="for 4 layers of 2 KV heads, but this model has at least"):
            PositionBias(KeyNorm(), EDGES, TABLE).score(view)


# -- as a file -----------------------------------------------------------------------------------------------------


def table_file(folder: Path, bias: Tensor, edges: tuple[int, ...] = (0, 50)) -> str:
    meta = Meta(KIND, "kv_compress", config_fingerprint(config("llama")), "llama", 2, 2, {})
    save(folder / "table", {"bias": bias, "edges": torch.tensor(edges)}, meta, force=True)
    return str(folder / "table")


def test_kv_compress_adds_it_to_its_sums(tmp_path: Path) -> None:
    ids, bias = text(1, 150), torch.zeros(2, 2, 2)
    plain = held(read(tiny("llama"), ids, method("kv_compress", budget=48)))
    bias[1, 0, 0] = 50.0  # the first bin of one head: nothing there may go before all else has
    file = table_file(tmp_path, bias)
    assert held(read(tiny("llama"), ids, method("kv_compress", budget=48, bias=file))) == plain  # weighed by 0
    found = held(read(tiny("llama"), ids, method("kv_compress", budget=48, bias=file, bias_weight=1.0)))
    assert found != plain
    assert set(range(50)) <= set(found[1][0])
    assert sum(len(head) for layer in found for head in layer) <= 48 * 4


def test_a_biased_recipe_is_for_one_model(tmp_path: Path) -> None:
    file = table_file(tmp_path, torch.zeros(2, 2, 2))
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("qwen3"), "kv_compress", budget=48, bias=file)
    with pytest.raises(OptionError, match="weighs a table that was not given"):
        method("kv_compress", bias_weight=1.0)
    with pytest.raises(CalibrationError, match=r"neither a file nor shipped for kv_compress \(shipped: none\)"):
        method("kv_compress", bias="llama-9")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "has no edges of bins"),
        ({"edges": torch.tensor([0, 5])}, "has no edges of bins"),
        ({"edges": torch.tensor([0, 5]), "bias": torch.zeros(2, 2, 3)}, "no bias in each of them for 2 layers of 2"),
        ({"edges": torch.tensor([0, 5]), "bias": torch.zeros(3, 2, 2)}, "no bias in each of them for 2 layers of 2"),
        ({"edges": torch.tensor([0.0, 5.0]), "bias": torch.zeros(2, 2, 2)}, "whole positions that rise from 0"),
        ({"edges": torch.tensor([0, 0]), "bias": torch.zeros(2, 2, 2)}, "whole positions that rise from 0"),
        ({"edges": torch.tensor([3, 5]), "bias": torch.zeros(2, 2, 2)}, "whole positions that rise from 0"),
        ({"edges": torch.tensor([0, 5]), "bias": torch.full((2, 2, 2), torch.nan)}, "are not finite numbers"),
    ],
)
def test_damaged_tables_are_refused(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        biases(Artefact(Meta(KIND, "kv_compress", "x", "llama", 2, 2, {}), tensors))


def test_a_table_is_read_back(tmp_path: Path) -> None:
    bias = torch.rand(2, 2, 2)
    edges, table = biases(load(table_file(tmp_path, bias, (0, 9)), kind=KIND))
    assert edges == (0, 9)
    assert torch.equal(torch.tensor(table), bias)


def test_means_by_bin_are_the_slow_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    scores, positions = torch.rand(3, 60, generator=rng), torch.randint(0, 40, (3, 60), generator=rng)
    edges = torch.tensor([0, 7, 20, 90])
    found = bin_means(scores, positions, edges)
    for h in range(3):
        for n, (first, stop) in enumerate(((0, 7), (7, 20), (20, 90))):
            inside = (positions[h] >= first) & (positions[h] < stop)
            assert float(found[h, n]) == pytest.approx(float(scores[h][inside].mean()), rel=1e-4)
    assert found[:, 3].tolist() == [0.0] * 3
