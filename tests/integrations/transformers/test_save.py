"""A saved cache goes on as the original would; a damaged, foreign or mismatched file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import build, config, tiny
from torch import Tensor

import kvthrift
from kvthrift.errors import CacheStateError, ModelMismatchError, SaveFileError

LENGTH = 150


def ids(seed: int, length: int = LENGTH, batch: int = 1) -> Tensor:
    return torch.randint(1, 190, (batch, length), generator=torch.Generator().manual_seed(seed))


def go_on(model: torch.nn.Module, cache: kvthrift.Cache, steps: int = 70) -> Tensor:
    with torch.no_grad():
        logits = [model(input_ids=ids(9, 5), past_key_values=cache).logits]
        for step in range(steps):
            logits.append(model(input_ids=ids(100 + step, 1), past_key_values=cache).logits)
    return torch.cat([x.flatten(0, 1) for x in logits])


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("llama", "adakv", {}),
        ("llama", "h2o", {"decode": True}),
        ("llama", "expected_attention", {"every": 16}),
        ("llama", "snapkv", {"merge": "fold"}),
        ("llama", "streamingllm", {"rerotate": True, "decode": True}),
        ("gemma3", "snapkv", {}),
        ("gpt_neox", "cake", {}),
    ],
)
def test_goes_on_as_the_original(tmp_path: Path, name: str, recipe: str, options: dict[str, object]) -> None:
    model = tiny(name)
    cache = kvthrift.prefill(model, ids(1), recipe, budget=48, **options)
    cache.save(tmp_path / "cache.kv")
    loaded = kvthrift.load(tmp_path / "cache.kv", model)
    assert loaded.recipe == cache.recipe
    assert loaded.get_seq_length() == LENGTH
    torch.testing.assert_close(go_on(model, loaded), go_on(model, cache), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.kv"]


def test_padding_is_remembered(tmp_path: Path) -> None:
    model = tiny("llama")
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :40] = 0
    cache = kvthrift.prefill(model, ids(1, batch=2), "snapkv", budget=48, attention_mask=mask)
    cache.save(tmp_path / "cache.kv")
    loaded = kvthrift.load(tmp_path / "cache.kv", model)
    assert loaded.report().tokens == (LENGTH, LENGTH - 40)
    with pytest.raises(kvthrift.MaskError), torch.no_grad():
        model(input_ids=ids(2, 1, 2), past_key_values=loaded)


def test_an_existing_file_is_left_as_it_is(tmp_path: Path) -> None:
    cache = kvthrift.prefill(tiny("llama"), ids(1), "knorm", budget=48)
    target = tmp_path / "cache.kv"
    target.write_text("mine")
    with pytest.raises(SaveFileError, match="exists and was left"):
        cache.save(target)
    assert target.read_text() == "mine"
    cache.save(target, overwrite=True)
    kvthrift.load(target, tiny("llama"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    cache = kvthrift.prefill(tiny("llama"), ids(1), "knorm", budget=48)
    with pytest.raises(SaveFileError, match="cannot be written"):
        cache.save(tmp_path / "no" / "cache.kv")


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CacheStateError, match="empty"):
        kvthrift.Cache(tiny("llama").config, "knorm", budget=48).save(tmp_path / "cache.kv")


def test_linear_attention_layers_cannot_be_saved(tmp_path: Path) -> None:
    cache = kvthrift.prefill(tiny("qwen3_next"), ids(1), "knorm", budget=48)
    with pytest.raises(SaveFileError, match="cannot save"):
        cache.save(tmp_path / "cache.kv")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    kvthrift.prefill(tiny("llama"), ids(1), "knorm", budget=48).save(tmp_path / "cache.kv")
    return tmp_path / "cache.kv"


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(SaveFileError, match="no saved cache"):
        kvthrift.load(tmp_path / "none.kv", tiny("llama"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SaveFileError, match="damaged"):
        kvthrift.load(saved, tiny("llama"))


def test_one_flipped_byte(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    whole[-100] ^= 1
    saved.write_bytes(bytes(whole))
    with pytest.raises(SaveFileError, match="damaged"):
        kvthrift.load(saved, tiny("llama"))


def test_a_foreign_file(saved: Path) -> None:
    save_file(load_file(saved), saved)  # the same tensors without our header
    with pytest.raises(SaveFileError, match="not a cache that kvthrift saved"):
        kvthrift.load(saved, tiny("llama"))


def test_another_model(saved: Path) -> None:
    with pytest.raises(ModelMismatchError, match="another model"):
        kvthrift.load(saved, tiny("qwen2"))
    with pytest.raises(ModelMismatchError, match="another model"):
        kvthrift.load(saved, tiny("llama", seed=1))


def test_another_dtype(saved: Path) -> None:
    model = build(config("llama"), "kvthrift").bfloat16()
    with pytest.raises(ModelMismatchError):
        kvthrift.load(saved, model)
