"""Calibrating a transformers model by letting it go on with a text, or by all of its queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.knowing import Letters, Spelling, knows
from tests.models import config, text, tiny
from transformers import DynamicCache

from kvthrift import Cache, CalibrationError, ContextError, OptionError, UnsupportedModelError, method
from kvthrift.calibrate import entropy, load, retrieval
from kvthrift.integrations.transformers import measuring
from kvthrift.integrations.transformers.facts import attention_modules, config_fingerprint, output_weight

WINDOW, MOST = 8, 6


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_rows_and_outputs_are_the_models_own(name: str) -> None:
    ids = text(1, 70)
    found = measuring.continuer(tiny(name))(tuple(ids[0].tolist()), WINDOW, MOST)
    eager = tiny(name, "eager")
    made = tiny(name, "sdpa").generate(
        ids, past_key_values=DynamicCache(config=eager.config), max_new_tokens=MOST, do_sample=False
    )
    assert found.said == tuple(made[0, 70:].tolist())
    whole = made[:, :-1]  # the last token is never fed
    with torch.inference_mode():
        wanted = eager(whole, output_attentions=True).attentions
    layers = list(found.layers)
    kinds = getattr(config(name), "layer_types", None)
    numbers = [n for n in range(config(name).num_hidden_layers) if not kinds or kinds[n] == "full_attention"]
    assert [layer.number for layer in layers] == numbers
    for layer in layers:
        assert layer.rows.shape[1] == WINDOW + MOST - 1
        torch.testing.assert_close(layer.rows, wanted[layer.number][0, :, 70 - WINDOW :], rtol=1e-3, atol=1e-5)
        module = attention_modules(tiny(name))[layer.number]
        assert torch.equal(layer.output_weight(), output_weight(module))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_is_measured_and_the_file_is_for_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knows(monkeypatch)
    model, out = tiny(name), tmp_path / "out"
    stages: dict[str, float] = {}
    measuring.measure_retrieval(model, Spelling(), out, samples=2, length=700, progress=stages.__setitem__)  # type: ignore[arg-type]
    assert stages == {"Ranking heads": 1.0, "Measuring layers": 1.0}
    found = load(out, kind=retrieval.KIND)
    assert found.meta.model == config_fingerprint(config(name))
    heads, errors = retrieval.tables(found)
    assert all(sorted(row) == list(range(4)) for row in heads)
    assert sum(errors) == pytest.approx(1.0)
    kinds = getattr(config(name), "layer_types", None) or ["full_attention"] * len(errors)
    assert [error > 0 for error in errors] == [kind == "full_attention" for kind in kinds]
    Cache(config(name), method("compresskv", budget=64, calibration=str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_cut_short_goes_on_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows(monkeypatch)

    class Killed(Exception):
        pass

    def kill(stage: str, part: float) -> None:
        if stage == "Measuring layers" and part > 0:
            raise Killed

    model = tiny("llama")
    with pytest.raises(Killed):
        measuring.measure_retrieval(model, Spelling(), tmp_path / "a", samples=2, length=700, progress=kill)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    with pytest.raises(CalibrationError, match="samples 2 instead of 3"):
        measuring.measure_retrieval(model, Spelling(), tmp_path / "a", samples=3, length=700)  # type: ignore[arg-type]
    taken: list[tuple[str, float]] = []
    measuring.measure_retrieval(
        model,
        Spelling(),
        tmp_path / "a",
        samples=2,
        length=700,
        progress=lambda *x: taken.append(x),  # type: ignore[arg-type]
    )
    assert all(stage == "Measuring layers" for stage, _ in taken)
    measuring.measure_retrieval(model, Spelling(), tmp_path / "b", samples=2, length=700)  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_entropies_are_those_of_all_queries(tmp_path: Path, name: str) -> None:
    model, out = tiny(name), tmp_path / "out"
    measuring.measure_entropy(model, Letters(), out, samples=2, length=200)  # type: ignore[arg-type]
    found = load(out, kind=entropy.KIND)
    table = entropy.entropies(found)
    assert table.shape[0] == 2
    kinds = getattr(config(name), "layer_types", None) or ["full_attention"] * table.shape[1]
    assert [bool((row > 0).all()) for row in table[0]] == [kind == "full_attention" for kind in kinds]
    Cache(config(name), method("uncomp", budget=64, calibration=str(out)))


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    out, model, letters = tmp_path / "out", tiny("llama"), Spelling()
    both: Any = (measuring.measure_retrieval, measuring.measure_entropy)
    with pytest.raises(CalibrationError, match="the answer in none of 1 needle tests"):
        measuring.measure_retrieval(model, letters, out, samples=1, length=700)  # type: ignore[arg-type]
    (tmp_path / "out.partial").unlink()
    for measure in both:
        with pytest.raises(CalibrationError, match="too short"):
            measure(model, letters, out, length=50)
        with pytest.raises(CalibrationError, match="too few"):
            measure(model, letters, out, length=1000, text="short\n\ntext")
        with pytest.raises(ContextError, match="reads at most"):
            measure(model, letters, out, length=50000)
        with pytest.raises(OptionError, match="samples=0"):
            measure(model, letters, out, samples=0)
        with pytest.raises(UnsupportedModelError, match="attends with"):
            measure(tiny("llama", "sdpa"), letters, out)
    assert not list(tmp_path.iterdir())
