"""KVzap's linear form: each entry is scored by itself, from its own key and value, by a map that was fitted offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitted import fitted
from tests.knowing import Spelling
from tests.models import config, text, tiny
from tests.reading import held, read
from tests.views import layer_view

from kvthrift import Cache, CalibrationError, ModelMismatchError, OptionError, Recipe, method, prefill
from kvthrift.calibrate import load
from kvthrift.calibrate.surrogate import KIND
from kvthrift.core import Rope
from kvthrift.integrations.transformers.surrogates import measure_surrogate
from kvthrift.score import LinearSurrogate
from kvthrift.score.surrogate import EXTRA, features, pack, unpack

D = 4
ROPE = Rope(torch.tensor([1.0, 0.1]))


def made(weights: torch.Tensor) -> LinearSurrogate:
    return LinearSurrogate(pack(weights), weights.shape[0], weights.shape[1])


def seen(heads: int = 2, entries: int = 6, **changes: Any) -> Any:
    view = layer_view(heads=heads, entries=entries, layers=1, dim=D)
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(1, heads, entries, D, generator=draw)
    view.values, view.rope = torch.randn(1, heads, entries, D, generator=draw), ROPE
    view.positions = torch.arange(entries).expand(1, heads, entries) + changes.pop("start", 0)
    view.keys = ROPE.rotate(plain, view.positions)
    for name, value in changes.items():
        setattr(view, name, value)
    return view, plain


def test_features_of_one_entry() -> None:
    found = features(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0]))
    assert found.tolist() == [3.0, 4.0, 0.0, -2.0, 5.0, 2.0, 1.0]


def test_scores_are_exp_of_the_map_of_what_was_not_yet_rotated() -> None:
    weights = torch.randn(1, 2, 2 * D + EXTRA, generator=torch.Generator().manual_seed(3)).half().float()
    view, plain = seen()
    wanted = torch.einsum("bhtf,hf->bht", features(plain, view.values), weights[0]).exp()
    torch.testing.assert_close(made(weights).score(view), wanted, rtol=1e-4, atol=1e-5)


def test_a_place_in_the_text_and_the_neighbours_change_nothing() -> None:
    weights = torch.randn(1, 2, 2 * D + EXTRA, generator=torch.Generator().manual_seed(3))
    here, there = made(weights).score(seen()[0]), made(weights).score(seen(start=1000)[0])
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
    few, _ = seen()
    few.keys, few.values, few.positions = (x[:, :, 2:4] for x in (few.keys, few.values, few.positions))
    few.lengths = torch.full((1, 2), 2)
    torch.testing.assert_close(made(weights).score(few), here[:, :, 2:4], rtol=1e-4, atol=1e-5)


def test_what_is_not_there_scores_nothing() -> None:
    view, _ = seen(lengths=torch.tensor([[6, 3]]))
    found = made(torch.ones(1, 2, 2 * D + EXTRA)).score(view)
    assert found[0, 1, 3:].tolist() == [0.0] * 3
    assert bool((found[0, 0] > 0).all())


def test_weights_go_into_a_recipe_and_back(tmp_path: Path) -> None:
    weights = torch.randn(2, 3, 7).half().float()
    assert torch.equal(unpack(pack(weights), 2, 3), weights)
    recipe = Recipe("x", made(weights))
    recipe.save(tmp_path / "x.toml")
    assert Recipe.load(tmp_path / "x.toml") == recipe


@pytest.mark.parametrize("weights", ["not base64!", pack(torch.ones(7)), pack(torch.full((2, 3, 7), torch.inf))])
def test_damaged_weights_are_refused(weights: str) -> None:
    with pytest.raises(OptionError, match=r"do not fit|not all finite"):
        LinearSurrogate(weights, 2, 3)


@pytest.mark.parametrize("sizes", [(1, 3, 2 * D + EXTRA), (1, 2, 2 * D + EXTRA + 1)])
def test_weights_for_other_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ModelMismatchError, match="Calibrate for this model"):
        made(torch.ones(sizes)).score(seen()[0])


@pytest.mark.parametrize(
    ("budgets", "even"), [("pooled", False), ("headkv", False), ("heads", False), ("uniform", True)]
)
def test_budgets_are_exact_however_they_are_shared(budgets: str, even: bool) -> None:
    cache = read(tiny("llama"), text(1, 200), fitted(method("kvzap", budget=60, window=8, budgets=budgets)))
    counts = [len(head) for layer in held(cache) for head in layer]
    assert sum(counts) == 4 * 60
    assert (len(set(counts)) == 1) == even
    assert all(head[-8:] == list(range(192, 200)) for layer in held(cache) for head in layer)


def test_a_model_is_fitted_and_keeps_what_it_foretells(tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    found = measure_surrogate(model, Spelling(), out, samples=3, length=200)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert 0 < float(found.tensors["explained"].mean()) <= 1
    recipe = method("kvzap", calibration=str(out), budget=50, window=8)
    assert recipe.scorer == LinearSurrogate(pack(load(out, kind=KIND).tensors["weights"]), 2, 2, found.meta.model)
    assert sum(len(head) for layer in held(read(model, text(1, 200), recipe)) for head in layer) == 4 * 50
    with pytest.raises(ModelMismatchError):
        Cache(config("qwen3"), recipe)


def test_a_cut_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    model = tiny("llama")
    whole = measure_surrogate(model, Spelling(), tmp_path / "whole", samples=3, length=150)  # type: ignore[arg-type]

    def cut(stage: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_surrogate(model, Spelling(), tmp_path / "cut", samples=3, length=150, progress=cut)  # type: ignore[arg-type]
    assert (tmp_path / "cut.sums").exists()
    again = measure_surrogate(model, Spelling(), tmp_path / "cut", samples=3, length=150)  # type: ignore[arg-type]
    assert torch.equal(again.tensors["weights"], whole.tensors["weights"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_it_may_be_fitted_to_kvzip_plus(tmp_path: Path) -> None:
    model = tiny("llama")
    plain, plus = (
        measure_surrogate(model, Spelling(), tmp_path / str(x), samples=8, length=200, plus=x)  # type: ignore[arg-type]
        for x in (False, True)
    )
    assert not torch.equal(plain.tensors["weights"], plus.tensors["weights"])
    assert "target" not in plain.meta.provenance
    assert plus.meta.provenance["target"] == "kvzip+"
    recipe = method("kvzap", calibration=str(tmp_path / "True"), budget=50, window=8)
    whole = prefill(model, text(1, 200), observe=[method("kvzip", plus=True), recipe])
    scorer, alike = method("kvzip", plus=True).scorer, list[float]()
    for number, layer in enumerate(whole.state.layers):
        view = layer.stored_view(whole.state)
        view.rope = whole._facts()[number].rope()
        target = layer.second_pass[scorer.look][0, :, 4:].log()  # type: ignore[attr-defined]
        found = recipe.scorer.score(view)[0, :, 4:].log()
        for one, other in zip(found, target, strict=True):
            alike.append(float(torch.corrcoef(torch.stack((one, other)))[0, 1]))
    assert sum(alike) / 4 > 0.4


def test_passages_too_few_for_a_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too short"):
        measure_surrogate(tiny("llama"), Spelling(), tmp_path / "x", samples=1, length=20)  # type: ignore[arg-type]
