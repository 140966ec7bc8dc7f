"""The command line that starts vLLM's own server with kvthrift in it. Knows nothing of terminals."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shape:
    """What a model's cache is made of.

    Attributes:
        layers, kv_heads: of the model.
        entry_bytes: of a token's key and value of one head.
        whole: layers without full attention, which stay as they are.
    """

    layers: int
    kv_heads: int
    entry_bytes: int
    whole: int = 0

    def pool(self, passed: Sequence[str], space: str, block: int, tables: int) -> int | None:
        """Blocks of ``block`` tokens, over all layers, in the server's cache; None where only vLLM will know.

        Args:
            passed: flags for vLLM.
            space: GiB, from the variable by which vLLM's CPU worker is told; empty if it is not.
            block: tokens a block.
            tables: block tables of a request, each with blocks of some of the layers.
        """
        given = flag(passed, "--num-gpu-blocks-override")
        if given.isdigit():
            return int(given) // tables
        ranks = flag(passed, "--tensor-parallel-size") or flag(passed, "-tp")
        size = int(space) << 30 if space.isdigit() else _bytes(flag(passed, "--kv-cache-memory-bytes"))
        heads = max(1, self.kv_heads // max(1, int(ranks) if ranks.isdigit() else 1))
        return size // (self.layers * heads * self.entry_bytes * block) if size else None


def _bytes(text: str) -> int:
    """A number as vLLM's flags take it: 25.6k is 25,600 and 1K is 1,024; 0 if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if found is None:
        return 0
    number, unit = found.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1000 if unit.islower() else 1024) ** power)


def shape_of(model: str, cache: str = "auto") -> Shape:
    """What a model's cache will be made of, read before the server is started.

    Args:
        model: as vLLM takes it.
        cache: the dtype of the KV cache, by vLLM's name.

    Raises:
        ModelError: the model's config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the config of model {model!r} cannot be read: {error}") from error
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    return Shape(
        layers,
        getattr(config, "num_key_value_heads", None) or heads,
        2 * cell_bytes(cache, width, _DTYPES.get(dtype, torch.bfloat16)),
        sum(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()),
    )


def settings_for(shape: Shape, asked: dict[str, Any]) -> Settings:
    """What the server will be asked for, read before it is started.

    Args:
        shape: of the model.
        asked: the object for ``additional_config["kvthrift"]``.

    Raises:
        KvthriftError: the method, its options or the budget cannot be honoured.
    """
    found = read_settings({KEY: asked}, layers=shape.layers, kv_heads=shape.kv_heads, entry_bytes=shape.entry_bytes)
    assert found is not None
    return found


def outlook(settings: Settings, prompt: int, block: int) -> tuple[int, int]:
    """Blocks that a prompt of so many tokens takes, and those that it keeps at its end (on average over layers)."""
    whole = -(-prompt // block)
    dropped = [plan(prompt, prompt, block, policy).dropped for policy in settings.policies]
    return whole, whole - sum(dropped) // len(dropped)


def forecast(settings: Settings, shape: Shape, prompt: int, block: int, pool: int | None) -> str:
    """What becomes of prompts of so many tokens, in a sentence.

    Args:
        settings: of the server.
        shape: of the model.
        prompt: tokens.
        block: tokens a block.
        pool: blocks of the cache, over all layers; None where they are not known.
    """
    whole, kept = outlook(settings, prompt, block)
    said = f"a prompt of {prompt:,} tokens keeps {kept:,} of {whole:,} blocks of {block}"
    if kept == whole:
        return f"{said}: all is kept"
    if shape.whole:
        return f"{said} in {shape.layers - shape.whole} of {shape.layers} layers; the others stay as they are"
    more = f"{said}: {whole / kept:.1f} times as many decode in the same memory"
    if pool is None:
        return more
    now, before = (pool // count for count in (kept, whole))
    return f"{more}, about {now:,} at a time instead of {before:,}"
