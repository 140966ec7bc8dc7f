"""Calibrating a transformers model: the rows are those of its own eager attention, the file those of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.knowing import Letters, know
from tests.models import config, text, tiny

from kvthrift import CalibrationError, ContextError, UnsupportedModelError
from kvthrift.calibrate import load
from kvthrift.integrations.transformers.calibrate import measure_heads, observer
from kvthrift.integrations.transformers.facts import config_fingerprint

WIDTH = 9


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_rows_are_those_of_the_models_own_attention(name: str) -> None:
    ids = text(1, 70)
    seen = observer(tiny(name))(tuple(ids[0].tolist()), WIDTH)
    with torch.inference_mode():
        wanted = tiny(name, "eager")(ids, output_attentions=True)
    assert seen.said == tuple(wanted.logits[0, -WIDTH:].argmax(-1).tolist())
    rows = dict(seen.rows)
    kinds = getattr(config(name), "layer_types", None)
    layers = config(name).num_hidden_layers
    assert list(rows) == [n for n in range(layers) if not kinds or kinds[n] == "full_attention"]
    for number, found in rows.items():
        attention = wanted.attentions[number][0, :, -WIDTH:]  # [HG, W, T]
        torch.testing.assert_close(found.flatten(0, 1), attention, rtol=1e-4, atol=1e-6)


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch)


@pytest.mark.usefixtures("knowing")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_a_model_is_measured_and_the_file_is_for_it(tmp_path: Path, name: str) -> None:
    model, out = tiny(name), tmp_path / "out"
    measure_heads(model, Letters(), out, samples=2, length=700)
    found = load(out, kind="head_importance")
    made = config(name)
    assert found.meta.model == config_fingerprint(made)
    assert (found.meta.layers, found.meta.kv_heads) == (made.num_hidden_layers, _kv_heads(made))
    table = found.tensors["importance"]
    assert float(table.sum()) == pytest.approx(1.0)
    kinds = getattr(made, "layer_types", None) or ["full_attention"] * found.meta.layers
    assert [bool(row.sum() > 0) for row in table] == [kind == "full_attention" for kind in kinds]


def _kv_heads(made: Any) -> int:
    return int(getattr(made, "num_key_value_heads", None) or made.num_attention_heads)


@pytest.mark.usefixtures("knowing")
def test_other_weights_do_not_go_on_from_a_run_that_was_cut_short(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(_: str, part: float) -> None:
        if part >= 0.5:
            raise Killed

    with pytest.raises(Killed):
        measure_heads(tiny("llama"), Letters(), tmp_path / "out", samples=2, length=700, progress=kill)
    with pytest.raises(CalibrationError, match="weights"):
        measure_heads(tiny("llama", seed=1), Letters(), tmp_path / "out", samples=2, length=700)
    measure_heads(tiny("llama"), Letters(), tmp_path / "out", samples=2, length=700)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CalibrationError, match="no token of the answer"):
        measure_heads(tiny("llama"), Letters(), out, samples=1, length=700)
    with pytest.raises(CalibrationError, match="too short"):
        measure_heads(tiny("llama"), Letters(), out, length=100)
    with pytest.raises(CalibrationError, match="too few"):
        measure_heads(tiny("llama"), Letters(), out, length=700, text="Once upon a time.")
    with pytest.raises(ContextError, match="reads at most 4096"):
        measure_heads(tiny("llama"), Letters(), out, length=5000)
    with pytest.raises(UnsupportedModelError, match="attends with 'sdpa'"):
        measure_heads(tiny("llama", "sdpa"), Letters(), out, length=700, samples=1)
    assert not out.exists()
