"""What the worker's model runner knows of each row of a batch. The one place that touches it.

vLLM hands a backend's metadata builder the batch, but not each request's prompt length or id, and asks a backend about
a layer's cache without saying which layer. One private method of the runner and one method of attention layers are
wrapped to learn that (``contract.py`` lists both).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvthrift.errors import UnsupportedModelError

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_METHOD = "_build_attention_metadata"
_current: list[Any] = []
_asked: list[str] = []


@dataclass(frozen=True)
class Rows:
    """Of each request in the batch, in order: its id, and its prompt's tokens."""

    ids: tuple[str, ...]
    prompts: tuple[int, ...]


def watch_runner() -> None:
    """Learn from now on which runner builds metadata; once a process."""
    runner = sys.modules[_RUNNER].GPUModelRunner
    stock = getattr(runner, _METHOD)
    if getattr(stock, "kvthrift", False):
        return

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        _current[:] = [self]
        return stock(self, *args, **kwargs)

    build.kvthrift = True  # type: ignore[attr-defined]
    setattr(runner, _METHOD, build)


def watch_layers(attention: Any) -> None:
    """Learn from now on which layer is asked for its cache spec, which vLLM does not tell a backend; once a process.

    Args:
        attention: vLLM's attention layer class.
    """
    stock = attention.get_kv_cache_spec
    if getattr(stock, "kvthrift", False):
        return

    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        _asked[:] = [self.layer_name]
        return stock(self, *args, **kwargs)

    ask.kvthrift = True  # type: ignore[attr-defined]
    attention.get_kv_cache_spec = ask


def asked_layer() -> int:
    """Index of the layer that was asked for its cache spec just now.

    Raises:
        UnsupportedModelError: it was of a kind that could not be watched.
    """
    if not _asked:
        raise UnsupportedModelError("a layer of this model gave its cache spec unseen, so its budget cannot be told.")
    return layer_index(_asked.pop())


def layer_index(name: str) -> int:
    """A layer's index among the model's layers, from its name.

    Raises:
        UnsupportedModelError: there is no number in it.
    """
    found = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if found is None:
        raise UnsupportedModelError(f"attention layer {name!r} has no number, so kvthrift cannot tell which one it is.")
    return found


def unfinished(ids: Iterable[str]) -> set[str]:
    """Those of ``ids`` whose requests the worker still knows."""
    return set() if not _current else {name for name in ids if name in _current[0].requests}


def rows() -> Rows | None:
    """The batch that is being built; None outside of one (while vLLM profiles)."""
    if not _current:
        return None
    batch = _current[0].input_batch
    count = batch.num_reqs
    return Rows(tuple(batch.req_ids[:count]), tuple(int(n) for n in batch.num_prompt_tokens[:count]))
