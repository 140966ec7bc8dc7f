"""UNComp's specification, one test a line of "How to check an implementation"; entropies are in calibrate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.fitted import fitted
from tests.models import config, text, tiny
from tests.reading import deep, held, read
from tests.views import keep, layer_view

from kvthrift import BudgetError, Cache, ModelMismatchError, OptionError, method
from kvthrift.allocate import GroupHeads, TableLayers
from kvthrift.calibrate import Meta, save
from kvthrift.calibrate.entropy import KIND
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.methods.uncomp import PUBLISHED_SIZES

LENGTH = 300


def table_file(folder: Path, layers: int = 2, **changes: int) -> str:
    made = config("llama", num_hidden_layers=layers, **changes)
    table = torch.tensor([[[0.5, 0.6, 0.2, 0.3]] * layers] * 3)
    meta = Meta(KIND, "uncomp", config_fingerprint(made), "llama", layers, 2, {"head_dim": 16})
    save(folder / "table.safetensors", {"entropy": table}, meta, force=True)
    return str(folder / "table.safetensors")


def sizes_of(heads: int, sizes: str, mean: int, entries: int = 2000, floor: int = 8) -> list[int]:
    parts = tuple(map(float, sizes.split("/")))
    labels = tuple(n * len(parts) // heads for n in range(heads))
    view = layer_view(heads=heads, entries=entries, layers=1, dim=2)
    split = GroupHeads((labels,), parts, floor).split(torch.zeros(1, heads, entries), torch.tensor([mean]), view)
    return [int(n) for n in split[0]]


def test_published_sizes_have_the_mean_they_are_for() -> None:
    for sizes, mean in PUBLISHED_SIZES.items():
        parts = [float(part) for part in sizes.split("/")]
        assert sum(parts) / len(parts) == pytest.approx(mean, rel=0.006), sizes
    assert (256 + 512) / 2 == 384
    eight = [float(part) for part in next(s for s in PUBLISHED_SIZES if s.startswith("32/132")).split("/")]
    assert sum(eight) / 8 == pytest.approx(383.6, abs=0.1)


@pytest.mark.parametrize(("sizes", "mean"), [(s, m) for s, m in PUBLISHED_SIZES.items() if s.count("/") in (1, 3)])
def test_at_its_mean_a_group_has_just_its_size(sizes: str, mean: int) -> None:
    parts = [int(part) for part in sizes.split("/")]
    found = sizes_of(8, sizes, mean)
    assert sum(found) == 8 * mean
    wanted = [parts[n * len(parts) // 8] for n in range(8)]
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= (0 if sum(parts) == mean * len(parts) else 2)


def test_sizes_scale_with_the_budget_and_never_fall_below_the_window() -> None:
    assert sizes_of(4, "256/512", 48) == [32, 32, 64, 64]
    assert sizes_of(4, "16/112", 24) == [8, 8, 40, 40]
    assert sizes_of(4, "16/112", 8) == [8] * 4


def test_a_short_text_fills_other_heads() -> None:
    assert sizes_of(4, "256/512", 384, entries=400) == [368, 368, 400, 400]
    assert sizes_of(4, "256/512", 384, entries=384) == [384] * 4


def test_cache_lengths_after_prefill_and_every_step(tmp_path: Path) -> None:
    recipe = method("uncomp", calibration=table_file(tmp_path), budget=48, decode=True)
    cache = read(tiny("llama"), text(1, LENGTH), recipe)
    assert [[len(head) for head in layer] for layer in held(cache)] == [[64, 32]] * 2  # the first has more entropy
    for step in range(20):
        with torch.inference_mode():
            tiny("llama")(input_ids=text(1, 1, seed=step), past_key_values=cache)
        for layer in held(cache):
            # the entry just read goes in before the next pass cuts again
            assert [len(head) for head in layer] == [65, 33]
            assert all(head[-9:] == list(range(LENGTH + step - 8, LENGTH + step + 1)) for head in layer)
    cache.check_integrity()


def test_equal_sizes_are_snapkv() -> None:
    view = layer_view(heads=4, group=2, entries=LENGTH, window=8, layers=2)
    ours = fitted(method("uncomp", sizes="5/5"), kv_heads=4)
    assert torch.equal(keep(ours, view, 50), keep(method("snapkv", window=8), view, 50))


def test_equal_sizes_with_decode_are_snapkv_with_eviction_at_every_step(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    caches = [
        read(tiny("llama"), text(1, LENGTH), recipe)
        for recipe in (
            method("uncomp", calibration=file, sizes="1/1", budget=40, decode=True),
            method("snapkv", window=8, budget=40, every=1),
        )
    ]
    for step in range(6):
        for cache in caches:
            with torch.inference_mode():
                tiny("llama")(input_ids=text(1, 1, seed=step), past_key_values=cache)
    assert held(caches[0]) == held(caches[1])


def test_sizes_above_the_length_keep_everything(tmp_path: Path) -> None:
    recipe = method("uncomp", calibration=table_file(tmp_path), budget=100)
    assert held(read(tiny("llama"), text(1, 100), recipe)) == [[list(range(100))] * 2] * 2


def test_staged_gives_lower_layer_groups_more(tmp_path: Path) -> None:
    recipe = method("uncomp", staged=4096)
    assert isinstance(recipe.layers, TableLayers)
    weights = recipe.layers.weights
    assert weights[-1] == 1536
    assert list(weights) == sorted(weights, reverse=True)
    model = deep(3)
    over = TableLayers((4096.0, 2816.0, 1536.0), least=0)
    found = fitted(method("uncomp", budget=60), layers=3).with_options(layers=over)
    lengths = [sum(map(len, layer)) for layer in held(read(model, text(1, LENGTH), found))]
    assert sum(lengths) == 60 * 2 * 3
    assert (lengths[0] / 2 - 8) / (lengths[2] / 2 - 8) == pytest.approx(4096 / 1536, rel=0.03)  # beside the window


def test_pooled_is_mean_or_max(tmp_path: Path) -> None:
    table = torch.tensor([[[0.1, 0.9, 0.6, 0.6], [0.1, 0.9, 0.6, 0.6]]])
    made = config("llama")
    meta = Meta(KIND, "uncomp", config_fingerprint(made), "llama", 2, 2, {"head_dim": 16})
    save(tmp_path / "t", {"entropy": table}, meta)
    heads = [method("uncomp", calibration=str(tmp_path / "t"), pooled=how).heads for how in ("mean", "max")]
    assert [h.labels for h in heads if isinstance(h, GroupHeads)] == [((0, 1),) * 2, ((1, 0),) * 2]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama", num_hidden_layers=3), "uncomp", budget=64, calibration=file)
    with pytest.raises(ModelMismatchError, match="2 layers of 2 KV heads, but this model has at least 2 of 3"):
        GroupHeads(((0, 1), (0, 1))).split(torch.zeros(1, 3, 60), torch.tensor([20]), layer_view(heads=3, layer=1))
    with pytest.raises(BudgetError, match="8 recent"):
        Cache(config("llama"), "uncomp", budget=7, calibration=file)
    for options in ({"sizes": "256/-1"}, {"sizes": "a/b"}, {"sizes": ""}, {"staged": 1000}):
        with pytest.raises(OptionError, match=next(iter(options))):
            method("uncomp", **options)


def halved(entries: int, mean: int, sizes: tuple[float, ...] = (256.0, 512.0), floor: int = 8) -> list[int]:
    view = layer_view(heads=4, entries=entries, layers=1, dim=2)
    part = GroupHeads(((0, 0, 1, 1),), sizes, floor, halved=True)
    return [int(n) for n in part.split(torch.zeros(1, 4, entries), torch.tensor([mean]), view)[0]]


def test_of_a_text_no_longer_than_the_larger_size_the_small_group_keeps_half() -> None:
    assert halved(513, 384) == [256, 256, 512, 512]
    assert halved(512, 384) == [256, 256, 512, 512]
    assert halved(511, 384) == [255, 255, 511, 511]
    assert halved(400, 384) == [200, 200, 400, 400]
    assert halved(33, 24) == [16, 16, 32, 32]
    assert halved(30, 24) == [15, 15, 30, 30]
    assert sizes_of(4, "256/512", 384, entries=400) == [368, 368, 400, 400]  # what it is without: all is used


def test_halving_never_exceeds_the_budget_nor_takes_the_window() -> None:
    assert halved(30, 20, (8.0, 512.0)) == [10, 10, 30, 30]  # 8 to 512, so that half would be too much
    assert halved(12, 10) == [8, 8, 12, 12]
    with pytest.raises(OptionError, match="rule for two groups"):
        GroupHeads(sizes=(1.0, 2.0, 3.0), halved=True)
    with pytest.raises(OptionError, match="deleted=True gives one up"):
        method("uncomp", short="halved", deleted=True)


def test_the_short_rule_is_followed_by_a_cache(tmp_path: Path) -> None:
    recipe = method("uncomp", calibration=table_file(tmp_path), short="halved", budget=48)
    for length, wanted in ((60, [[30, 60]] * 2), (64, [[32, 64]] * 2), (65, [[32, 64]] * 2), (48, [[48, 48]] * 2)):
        cache = read(tiny("llama"), text(1, length), recipe)
        assert [sorted(map(len, layer)) for layer in held(cache)] == wanted
        for layer in held(cache):
            assert all(head[-8:] == list(range(length - 8, length)) for head in layer)
