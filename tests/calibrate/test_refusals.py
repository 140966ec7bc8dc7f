"""Every file that a method reads, held against damage, other models and other sizes: each is a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.knowing import Spelling
from tests.models import config, text, tiny
from tests.reading import read

from kvthrift import Cache, CalibrationError, ModelMismatchError, RecipeError, method
from kvthrift.calibrate import Meta, save
from kvthrift.integrations.transformers.calibrate import measure_heads
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.integrations.transformers.head_scores import measure_head_scores
from kvthrift.integrations.transformers.measuring import measure_entropy, measure_retrieval
from kvthrift.integrations.transformers.surrogates import measure_surrogate
from kvthrift.score.surrogate import EXTRA

D = 16  # head dim of the tiny llama: 2 layers of 2 KV heads, 4 query heads


def importance(layers: int, heads: int) -> dict[str, torch.Tensor]:
    return {"importance": torch.rand(layers, heads)}


def ranked(layers: int, heads: int) -> dict[str, torch.Tensor]:
    return {"heads": torch.arange(2 * heads).expand(layers, -1).clone(), "layer_error": torch.ones(layers) / layers}


def entropy(layers: int, heads: int) -> dict[str, torch.Tensor]:
    return {"entropy": torch.rand(3, layers, 2 * heads)}


def weights(layers: int, heads: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.randn(layers, heads, 2 * D + EXTRA)}


def bins(layers: int, heads: int) -> dict[str, torch.Tensor]:
    return {"edges": torch.tensor([0, 40]), "bias": torch.rand(layers, heads, 2)}


# method -> kind, the option that names the file, what is in it, other options
FILES: dict[str, tuple[str, str, Callable[[int, int], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "headkv": ("head_importance", "calibration", importance, {}),
    "compresskv": ("semantic_retrieval", "calibration", ranked, {}),
    "uncomp": ("query_entropy", "calibration", entropy, {}),
    "kvzap": ("score_surrogate", "calibration", weights, {}),
    "kvzip": ("head_importance", "calibration", importance, {"budgets": "heads"}),
    "kv_compress": ("position_bias", "bias", bins, {"bias_weight": 1.0}),
}
REMEDY = {"kv_compress": "that kvthrift.calibrate.bins describes"}  # the others: 'kvthrift calibrate METHOD'
MEASURES = {
    "headkv": measure_heads,
    "compresskv": measure_retrieval,
    "uncomp": measure_entropy,
    "kvzap": measure_surrogate,
    "kvzip": measure_head_scores,
}


def written(folder: Path, name: str, *, layers: int = 2, heads: int = 2, kind: str = "", claim: int = 0) -> Path:
    right, _, tensors, _ = FILES[name]
    print_ = config_fingerprint(config("llama"))
    meta = Meta(kind or right, name, print_, "llama", claim or layers, heads, {"head_dim": D})
    save(folder / "table", tensors(layers, heads), meta, force=True)
    return folder / "table"


def recipe(name: str, file: Path | str, **more: Any) -> Any:
    _, option, _, options = FILES[name]
    return method(name, **{option: str(file), **options, **more})


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_taken(name: str, tmp_path: Path) -> None:
    cache = read(tiny("llama"), text(1, 120), recipe(name, written(tmp_path, name), budget=48))
    assert cache.report().entries <= 48 * 4


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name)
    whole = file.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b"", b"not a table"):
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match=r"is damaged.*Calibrate again"):
            recipe(name, file)


@pytest.mark.parametrize("name", FILES)
def test_a_file_for_something_else_or_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds a calibration of kind 'horoscope'"):
        recipe(name, written(tmp_path, name, kind="horoscope"))
    with pytest.raises(
        CalibrationError,
        match=f"neither a file nor shipped for {name}.*{REMEDY.get(name, f'kvthrift calibrate {name}')}",
    ):
        recipe(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", ["qwen3", "gpt_neox"])
def test_a_file_of_another_model_is_refused_before_anything_is_read(name: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config(other), recipe(name, written(tmp_path, name), budget=48))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_head_count_is_refused(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name, heads=3)
    with pytest.raises(ModelMismatchError, match=r"this model has|has 2 heads and|of this model|for this model"):
        read(tiny("llama"), text(1, 120), recipe(name, file, budget=48))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_fewer_layers_is_refused(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name, layers=1)
    with pytest.raises(ModelMismatchError, match=r"this model has|layer 1 has|of this model|for this model"):
        read(tiny("llama"), text(1, 120), recipe(name, file, budget=48))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_claims_other_sizes_than_it_has_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"[Cc]alibrate again|Make the table again"):
        recipe(name, written(tmp_path, name, claim=5))


@pytest.mark.parametrize("name", MEASURES)
def test_passages_too_short_and_texts_too_short_are_refused(name: str, tmp_path: Path) -> None:
    out, measure = tmp_path / "out", MEASURES[name]
    with pytest.raises(CalibrationError, match="too short"):
        measure(tiny("llama"), Spelling(), out, samples=1, length=30)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"the text has \d+ tokens, too few"):
        measure(tiny("llama"), Spelling(), out, samples=1, length=900, text="A short text.\n\n")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="samples=0 must be at least 1"):
        measure(tiny("llama"), Spelling(), out, samples=0, length=700)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
