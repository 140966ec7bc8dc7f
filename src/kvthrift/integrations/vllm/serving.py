"""The command line that starts vLLM's own server with kvthrift in it. Knows nothing of terminals."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from kvthrift.errors import ModelError, OptionError
from kvthrift.integrations.vllm.cells import cell_bytes
from kvthrift.integrations.vllm.plan import plan
from kvthrift.integrations.vllm.settings import KEY, Settings, read_settings

SERVER = "vllm.entrypoints.openai.api_server"
_EXTRA = "--additional-config"
_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


def command(model: str, asked: dict[str, Any], passed: Sequence[str]) -> list[str]:
    """The command that starts the server (``vllm serve`` itself does not work with every distribution of vLLM).

    Args:
        model: as vLLM takes it.
        asked: the object for ``additional_config["kvthrift"]``.
        passed: flags for vLLM, an ``--additional-config`` among them too.

    Raises:
        OptionError: the given additional config is no JSON object, or has kvthrift in it already.
    """
    rest, extra = _without_extra(list(passed))
    if KEY in extra:
        raise OptionError(f'{_EXTRA} has "{KEY}" in it, beside what --method and --budget say. Give one of the two.')
    config = json.dumps({**extra, KEY: asked})
    return [sys.executable, "-m", SERVER, "--model", model, _EXTRA, config, *rest]


def _without_extra(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    for index, word in enumerate(words):
        name, joined, value = word.partition("=")
        if name != _EXTRA:
            continue
        end = index + 1 if joined else index + 2
        text = value if joined else (words[index + 1] if index + 1 < len(words) else "")
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"{_EXTRA} is not JSON ({error}).") from error
        if not isinstance(found, dict):
            raise OptionError(f"{_EXTRA} must be a JSON object.")
        return words[:index] + words[end:], found
    return words, {}


def flag(passed: Sequence[str], name: str) -> str:
    """The value of one of the flags for vLLM; nothing if it is not given."""
    for index, word in enumerate(passed):
        given, joined, value = word.partition("=")
        if given == name:
            return value if joined else (passed[index + 1] if index + 1 < len(passed) else "")
    return ""


def settings_for(model: str, asked: dict[str, Any], cache: str = "auto") -> Settings:
    """What the server will be asked for, read before it is started.

    Args:
        model: as vLLM takes it.
        asked: the object for ``additional_config["kvthrift"]``.
        cache: the dtype of the KV cache, by vLLM's name.

    Raises:
        ModelError: the model's config cannot be read.
        KvthriftError: the method, its options or the budget cannot be honoured.
    """
    try:
        config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the config of model {model!r} cannot be read: {error}") from error
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    found = read_settings(
        {KEY: asked},
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        entry_bytes=2 * cell_bytes(cache, width, _DTYPES.get(dtype, torch.bfloat16)),
    )
    assert found is not None
    return found


def outlook(settings: Settings, prompt: int, block: int) -> tuple[int, int]:
    """Blocks that a prompt of so many tokens takes, and those that it keeps at its end (on average over layers)."""
    whole = -(-prompt // block)
    dropped = [plan(prompt, prompt, block, policy).dropped for policy in settings.policies]
    return whole, whole - sum(dropped) // len(dropped)
