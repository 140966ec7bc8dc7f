"""A cache as one safetensors file: entries, positions, the recipe, and who the model was.

A file is written beside its place and moved there, so that a half-written one is never found; a digest over the
tensors catches damage, and a fingerprint over the model's weights refuses another model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvthrift.core import LayerShape, QueryMoments
from kvthrift.errors import CacheStateError, KvthriftError, ModelMismatchError, SaveFileError
from kvthrift.integrations.transformers.cache import Cache, CacheLayer
from kvthrift.integrations.transformers.facts import attention_modules, module_facts, weights_fingerprint
from kvthrift.recipe import Recipe
from kvthrift.runtime import CacheState, LayerCache
from kvthrift.runtime.observe import QueryStatistics, QueryWindow
from kvthrift.store import LayerStore
from kvthrift.store.saved import flat, refill

FORMAT = "1"
_KEY = "kvthrift"


def save(cache: Cache, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a cache to ``path``.

    Raises:
        CacheStateError: the cache is empty, or a forward pass failed half way.
        SaveFileError: the file exists, cannot be written, or a layer's kind cannot be saved.
    """
    target = Path(path)
    if cache.state.broken or not cache.is_initialized:
        raise CacheStateError("there is nothing whole to save: the cache is empty or a forward pass failed half way.")
    if target.exists() and not overwrite:
        raise SaveFileError(f"{target} exists and was left as it is. Give another name, or overwrite=True.")
    tensors = _tensors(cache)
    header = json.dumps(_header(cache) | {"digest": _digest(tensors)})
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    except OSError as error:
        raise SaveFileError(f"{target} cannot be written: {error.strerror}.") from error
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={_KEY: header})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise SaveFileError(f"{target} cannot be written: {error}.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | Path, model: PreTrainedModel) -> Cache:
    """Read a cache written by :func:`save`, for the model it was made with.

    Raises:
        SaveFileError: the file is missing, damaged, or not a kvthrift cache of this format.
        ModelMismatchError: it was made with another model, or in another dtype.
    """
    header, tensors = _read(Path(path))
    modules = attention_modules(model)
    cache = Cache(model.config, Recipe.from_plain(header["recipe"]), page=int(header["page"]))
    numbers = [layer.number for layer in cache.state.layers]
    found = weights_fingerprint(model.config, {n: modules[n] for n in numbers if n in modules})
    if header["layers"] != numbers or header["model"] != found:
        raise ModelMismatchError(
            f"{path} was made with another model ({header['model_type']}, fingerprint {header['model']}; this one is "
            f"{found}). Load it with that model."
        )
    state = cache.state
    state.columns.length, state.sealed = int(header["length"]), bool(header["sealed"])
    history = tensors.get("history")
    state.columns.history = None if history is None else history.numpy().astype(bool)
    state.prompt = np.asarray(header["prompt"], dtype=np.int64) if header.get("prompt") else None
    for layer in state.layers:
        mine = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{layer.number}/")}
        if mine["keys"].dtype != model.dtype:
            raise ModelMismatchError(
                f"{path} holds {mine['keys'].dtype}, but the model runs in {model.dtype}. Load it in that."
            )
        _restore(layer, mine, header["shapes"][str(layer.number)], state, model.device)
    for number, front in enumerate(cache.layers):
        if isinstance(front, CacheLayer):
            front.bind(modules[front.place_number])
            if state.needs.rope and state.recipe.trigger.every is not None and not state.layers[front.place].whole:
                state.layers[front.place].turn_by(state, module_facts(modules[front.place_number]))
        else:
            _restore_sliding(front, tensors, number, header, model.device)
    return cache


def _header(cache: Cache) -> dict[str, Any]:
    state = cache.state
    modules = {layer.place_number: layer.module for layer in cache.layers if isinstance(layer, CacheLayer)}
    shapes = {}
    for layer in state.layers:
        store = _store(layer)
        shape = store.shape
        shapes[str(layer.number)] = [
            shape.kv_heads, shape.query_heads, shape.key_dim, shape.value_dim, layer.scale, layer.since,
        ]  # fmt: skip
    sliding = {str(n): x.cumulative_length for n, x in enumerate(cache.layers) if type(x) is DynamicSlidingWindowLayer}
    return {
        "format": FORMAT,
        "recipe": cache.recipe.plain(),
        "model": weights_fingerprint(cache.config, modules),
        "model_type": cache.config.model_type,
        "layers": [layer.number for layer in state.layers],
        "shapes": shapes,
        "sliding": sliding,
        "length": state.columns.length,
        "page": state.page,
        "sealed": state.sealed,
        "prompt": None if state.prompt is None else state.prompt.tolist(),
    }


def _store(layer: LayerCache) -> LayerStore:
    if layer.store is None:
        raise CacheStateError(f"layer {layer.number} holds nothing, so the cache cannot be saved.")
    return layer.store


def _tensors(cache: Cache) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if cache.state.columns.history is not None:
        out["history"] = torch.from_numpy(cache.state.columns.history.astype(np.uint8))
    for layer in cache.state.layers:
        store = _store(layer)
        mine = flat(store)
        if layer.window is not None and layer.window.queries is not None and layer.window.positions is not None:
            mine |= {"window.queries": layer.window.queries, "window.positions": layer.window.positions}
        if layer.statistics is not None and layer.statistics.moments is not None:
            m = layer.statistics.moments
            mine |= {"moments.count": m.count, "moments.total": m.total, "moments.outer": m.outer}
        out |= {f"{layer.number}/{name}": t.cpu().contiguous() for name, t in mine.items()}
    for number, front in enumerate(cache.layers):
        if isinstance(front, CacheLayer):
            continue
        if type(front) is not DynamicSlidingWindowLayer:
            raise SaveFileError(f"layer {number} is a {type(front).__name__}, which kvthrift cannot save.")
        out |= {f"{number}/stock.{name}": getattr(front, name).cpu().contiguous() for name in ("keys", "values")}
    return out


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise SaveFileError(f"there is no saved cache at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise SaveFileError(f"{path} is a safetensors file, but not a cache that kvthrift saved.")
            header = json.loads(metadata[_KEY])
            if header.get("format") != FORMAT:
                raise SaveFileError(
                    f"{path} has format {header.get('format')}, not {FORMAT}: another version wrote it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KvthriftError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise SaveFileError(f"{path} is damaged or not a saved cache: {error}. Make it anew.") from error
    if header.get("digest") != _digest(tensors):
        raise SaveFileError(f"{path} is damaged: its contents are not what was written. Make it anew.")
    return header, tensors


def _restore(
    layer: LayerCache, mine: dict[str, Tensor], sizes: list[Any], state: CacheState, device: torch.device
) -> None:
    shape = LayerShape(*(int(x) for x in sizes[:4]))
    store = LayerStore(shape, mine["lengths"].shape[0], mine["keys"].dtype, device, page=state.page)
    on = {name: t.to(device) for name, t in mine.items()}
    refill(store, on, layer.form(state))
    layer.store, layer.scale, layer.since, layer.group = store, float(sizes[4]), int(sizes[5]), shape.group
    if "window.queries" in on:
        layer.window = QueryWindow(max(state.observes.window, on["window.queries"].shape[2]))
        layer.window.hold(on["window.queries"], on["window.positions"])
    if "moments.count" in on:
        layer.statistics = QueryStatistics(0)
        layer.statistics.moments = QueryMoments(on["moments.count"], on["moments.total"], on["moments.outer"])


def _restore_sliding(
    layer: Any, tensors: dict[str, Tensor], number: int, header: dict[str, Any], device: torch.device
) -> None:
    keys, values = (tensors[f"{number}/stock.{name}"].to(device) for name in ("keys", "values"))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    layer.cumulative_length = int(header["sliding"][str(number)])
