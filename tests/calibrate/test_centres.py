"""Mean queries: what they are of, how texts are joined, and what a file of them must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.knowing import Letters
from tests.models import config, tiny
from torch import Tensor

from kvthrift import Cache, CalibrationError, MissingSignalError, method
from kvthrift.calibrate import Artefact, Meta, load
from kvthrift.calibrate.centres import KIND, as_text, centres, concentration, join, query_means
from kvthrift.integrations.transformers.centres import measure_centres


def test_means_of_two_queries() -> None:
    queries = torch.tensor([[[3.0, 1.0, 4.0, 7.0], [3.0, 1.0, -4.0, 7.0]]])  # pairs (3, 4), (3, -4) of dims 0 and 2
    found = query_means(queries[..., [0, 2, 1, 3]], 1)
    assert found.tolist() == [[3.0, 0.0, 1.0, 7.0, 5.0]]
    assert concentration(found[None], 4).item() == pytest.approx(3 / 5)


def test_texts_are_joined_by_their_mean() -> None:
    tables = [torch.randn(2, 3, 5), torch.randn(2, 3, 5)]
    torch.testing.assert_close(join([as_text(x) for x in tables]), (tables[0].double() + tables[1].double()) / 2)


def plain_queries(model: Any, ids: Tensor, name: str) -> list[Tensor]:
    """What the modules ``name`` of each layer give for ``ids [1, T]``, ``[HG, T, D]``: before any rotation."""
    found: list[Tensor] = []
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(lambda *x: found.append(x[2].detach()))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    return [x.reshape(ids.shape[1], heads, dim).transpose(0, 1) for x in found]


@pytest.mark.parametrize(("name", "module"), [("llama", "q_proj"), ("qwen3", "q_norm")])
def test_a_models_queries_are_taken_before_rotation_and_behind_their_norm(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny(name), []
    plain = type(model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    found = measure_centres(model, Letters(), tmp_path / "x", samples=2, length=300)  # type: ignore[arg-type]
    monkeypatch.undo()
    dim, texts = int(model.config.head_dim), [plain_queries(model, ids, module) for ids in seen]
    assert len(texts) == 2
    wanted = torch.stack([torch.stack([query_means(q, dim // 2) for q in text]) for text in texts]).mean(dim=0)
    torch.testing.assert_close(found.tensors["centres"].double(), wanted, atol=5e-3, rtol=5e-3)
    again = centres(load(tmp_path / "x", kind=KIND))
    assert torch.equal(again, found.tensors["centres"])
    assert not list(tmp_path.glob("*.partial"))
    Cache(config(name), method("triattention", calibration=str(tmp_path / "x"), budget=64))


def test_a_model_whose_rotation_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingSignalError, match="has not checked"):
        measure_centres(tiny("cohere"), Letters(), tmp_path / "x", samples=1, length=80)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "table", [None, torch.ones(2, 4), torch.ones(3, 4, 6), torch.ones(2, 3, 6), torch.full((2, 4, 6), torch.nan)]
)
def test_tables_of_another_shape_are_refused(table: Tensor | None) -> None:
    meta = Meta(KIND, "triattention", "x", "llama", 2, 2, {})
    with pytest.raises(CalibrationError, match="Calibrate again"):
        centres(Artefact(meta, {} if table is None else {"centres": table}))
