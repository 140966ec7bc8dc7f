"""Small networks: what they find where a linear map cannot, and what of a text is kept to say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.knowing import Spelling
from tests.models import text, tiny
from tests.reading import held
from tests.views import layer_view, plain_rope

from kvthrift import CalibrationError, ModelMismatchError, OptionError, Recipe, method, prefill
from kvthrift.calibrate import Artefact, Meta, load
from kvthrift.calibrate.mlp import Network, explained, fit, held_out, linear_fit, load_pairs, save_pairs
from kvthrift.calibrate.surrogate import KIND, network_of
from kvthrift.integrations.transformers.surrogates import measure_surrogate
from kvthrift.score import NetworkSurrogate
from kvthrift.score.surrogate import EXTRA, LOWEST, features, pack

L, H, N, F = 2, 2, 3000, 6


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Log scores that bend: a linear map of features of mean 3 and spread 2 cannot follow."""
    draw = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(L, H, N, F, generator=draw)
    x[..., -1] = 1.0
    y = (x[..., 0] - 3).abs() + 0.5 * x[..., 1] - 4 + 0.1 * torch.randn(L, H, N, generator=draw)
    y[1, 1] *= 20  # a head of another scale
    return x, y


def test_a_bend_is_found_that_a_linear_map_cannot_follow() -> None:
    x, y = planted()
    network, linear = fit(x[:, :, :2000], y[:, :, :2000], 8, epochs=150), linear_fit(x[:, :, :2000], y[:, :, :2000])
    found = explained(network(x[:, :, 2000:]), y[:, :, 2000:])
    plain = explained(torch.einsum("lhnf,lhf->lhn", x[:, :, 2000:], linear), y[:, :, 2000:])
    assert (found > 0.9).all()
    assert (plain < 0.6).all()
    rounded = explained(network.rounded()(x[:, :, 2000:]), y[:, :, 2000:])
    torch.testing.assert_close(rounded, found, atol=1e-3, rtol=0)
    assert torch.equal(*(fit(x, y, 8, epochs=1).table() for _ in range(2)))


def test_heads_do_not_touch_one_another() -> None:
    x, y = planted()
    before = fit(x, y, 3, epochs=1)
    other = y.clone()
    other[0, 0] = 1000 * other[0, 0].flip(0)
    after = fit(x, other, 3, epochs=1)
    same = (before.table() == after.table()).all(dim=-1)
    assert same.tolist() == [[False, True], [True, True]]


def test_explained_is_one_minus_the_residuals_share() -> None:
    wanted = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert explained(wanted, wanted).item() == 1.0
    assert explained(torch.full((1, 1, 3), 2.0), wanted).item() == 0.0
    assert explained(wanted.flip(-1), wanted).item() == -3.0


def test_every_fifth_text_is_kept_apart() -> None:
    assert held_out(15) == [4, 9, 14]
    assert held_out(2) == [1]


def test_pairs_are_kept_and_damage_is_refused(tmp_path: Path) -> None:
    x, y = torch.randn(L, H, 5, F), torch.rand(L, H, 5)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        save_pairs(path, x, y)
    found = load_pairs(paths)
    assert found[0].shape == (L, H, 10, F)
    torch.testing.assert_close(found[1][..., 5:], y.log())
    paths[0].write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="missing or damaged"):
        load_pairs(paths)


def view_of(entries: int = 9) -> Any:
    view = layer_view(heads=2, entries=entries, layers=1, dim=4)
    view.rope = plain_rope(4)
    return view


def test_a_scorer_says_what_the_network_says() -> None:
    draw, size = torch.Generator().manual_seed(0), 2 * 4 + EXTRA
    parts = [torch.randn(1, 2, *s, generator=draw).half().float() for s in ((size, 3), (3,), (3,), ())]
    network, view = Network(*parts), view_of()
    found = NetworkSurrogate(pack(network.table()), 1, 2, 3).score(view)
    plain = view.rope.rotate(view.keys, -view.positions)
    wanted = network(features(plain, view.values)).clamp(LOWEST, -LOWEST).exp()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_long_layer_is_scored_in_blocks() -> None:
    table = 0.1 * torch.randn(1, 2, (2 * 4 + EXTRA + 2) * 2 + 1)
    scorer, view = NetworkSurrogate(pack(table), 1, 2, 2), view_of(4100)
    whole = scorer.score(view)
    for name in ("keys", "values", "positions"):
        setattr(view, name, getattr(view, name)[:, :, -7:])
    view.lengths, view._valid, view.shared = torch.full((1, 2), 7), None, {}
    torch.testing.assert_close(scorer.score(view), whole[..., -7:])


def test_networks_of_other_sizes_are_refused() -> None:
    with pytest.raises(CalibrationError, match="without weights"):
        NetworkSurrogate().score(view_of())
    with pytest.raises(ModelMismatchError, match="1 layers of 2 KV heads and 9 weights"):
        NetworkSurrogate(pack(torch.ones(1, 2, 9)), 1, 2, 3).score(view_of())
    with pytest.raises(OptionError, match="width=0"):
        NetworkSurrogate(width=0)
    meta = Meta(KIND, "kvzap", "x", "llama", 2, 2, {"width": 3})
    with pytest.raises(CalibrationError, match="no finite network"):
        network_of(Artefact(meta, {"network": torch.ones(2, 3, 9)}))
    assert network_of(Artefact(meta, {"weights": torch.ones(2, 2, 9)})) is None


def test_a_model_is_measured_and_a_method_reads_the_file(tmp_path: Path) -> None:
    model, target = tiny("llama"), tmp_path / "x"
    measure_surrogate(model, Spelling(), target, samples=3, length=300, form="mlp")  # type: ignore[arg-type]
    found = load(target, kind=KIND)
    assert (found.meta.provenance["width"], found.meta.provenance["held_out"]) == (4, 1)  # 64 / 8 in 2 heads; of 3
    assert found.tensors["explained"].shape == found.tensors["explained_linear"].shape == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    recipe = method("kvzap", budget=64, calibration=str(target))
    assert isinstance(recipe.scorer, NetworkSurrogate)
    assert Recipe.from_plain(recipe.plain()) == recipe
    stays = held(prefill(model, text(1, 200), recipe))
    assert sum(len(head) for layer in stays for head in layer) == 64 * 4
    linear = tmp_path / "y"
    measure_surrogate(model, Spelling(), linear, samples=3, length=300)  # type: ignore[arg-type]
    assert held(prefill(model, text(1, 200), method("kvzap", budget=64, calibration=str(linear)))) != stays
    with pytest.raises(OptionError, match="samples=1 leaves no passage"):
        measure_surrogate(model, Spelling(), tmp_path / "z", samples=1, form="mlp")  # type: ignore[arg-type]


def test_a_run_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvthrift.integrations.transformers import surrogates

    model, options = tiny("llama"), {"samples": 3, "length": 200, "form": "mlp"}
    whole = measure_surrogate(model, Spelling(), tmp_path / "whole", **options)  # type: ignore[arg-type]
    plain = surrogates.save_pairs

    def third_fails(path: Path, *rest: torch.Tensor) -> None:
        if path.name.endswith("-2"):
            raise KeyboardInterrupt
        plain(path, *rest)

    monkeypatch.setattr(surrogates, "save_pairs", third_fails)
    with pytest.raises(KeyboardInterrupt):
        measure_surrogate(model, Spelling(), tmp_path / "x", **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    again = measure_surrogate(model, Spelling(), tmp_path / "x", **options)  # type: ignore[arg-type]
    assert torch.equal(again.tensors["network"], whole.tensors["network"])
