"""What the worker's model runner knows of each row of a batch. The one place that touches it.

vLLM hands a backend's metadata builder the batch, but not each request's prompt length or id, and tells no backend
which layer a cache is for. A few private methods of its two runners, one method of attention layers and the function
that groups them are wrapped for that (``contract.py`` lists them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvthrift.errors import UnsupportedModelError

_FIRST = "vllm.v1.worker.gpu_model_runner"
_SECOND = "vllm.v1.worker.gpu.model_runner"
_current: list[tuple[Any, Any]] = []  # the runner whose metadata is being built, and its batch
_preempted: set[str] = set()


@dataclass(frozen=True)
class Rows:
    """Of each request in the batch, in order: its id, its prompt's tokens, and those that are in the cache."""

    ids: tuple[str, ...]
    prompts: tuple[int, ...]
    done: tuple[int, ...] = ()


def _wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of each call of a method; once a process."""
    stock = getattr(owner, name)
    if getattr(stock, "kvthrift", False):
        return

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self, *args, **kwargs)
        return stock(self, *args, **kwargs)

    method.kvthrift = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def watch_runner() -> None:
    """Learn from now on which runner builds metadata, and for which batch; once a process."""
    if _FIRST in sys.modules:
        runner = sys.modules[_FIRST].GPUModelRunner
        _wrap(runner, "_build_attention_metadata", _first_builds)
        _wrap(runner, "_update_states", _first_updates)
    if _SECOND in sys.modules:
        runner = sys.modules[_SECOND].GPUModelRunner
        _wrap(runner, "prepare_attn", _second_builds)
        _wrap(runner, "prepare_dummy_attn", _second_pretends)


def _first_builds(runner: Any, *_: Any, **__: Any) -> None:
    _current[:] = [(runner, runner.input_batch)]


def _first_updates(_: Any, scheduled: Any, *__: Any, **___: Any) -> None:
    _preempted.update(getattr(scheduled, "preempted_req_ids", None) or ())


def _second_builds(runner: Any, batch: Any, *_: Any, **__: Any) -> None:
    _current[:] = [(runner, batch)]


def _second_pretends(*_: Any, **__: Any) -> None:
    _current.clear()


def give_specs(attention: Any, give: Callable[[Any, Any, Any], Any]) -> None:
    """Let ``give(layer, config, spec)`` have the last word on each layer's cache spec; once a process.

    Args:
        attention: vLLM's attention layer class.
        give: what it gives.
    """
    stock = attention.get_kv_cache_spec
    if getattr(stock, "kvthrift", False):
        return

    def ask(self: Any, config: Any) -> Any:
        return give(self, config, stock(self, config))

    ask.kvthrift = True  # type: ignore[attr-defined]
    attention.get_kv_cache_spec = ask


def watch_groups(module: Any, check: Callable[[Any, Any, Any], None]) -> None:
    """Let ``check(config, specs, groups)`` see how vLLM groups all layers by their cache specs; once a process.

    Args:
        module: vLLM's, that groups them.
        check: raises if they are not as they should be.
    """
    stock = module.get_kv_cache_groups
    if getattr(stock, "kvthrift", False):
        return

    def group(vllm_config: Any, kv_cache_spec: Any) -> Any:
        asked = dict(kv_cache_spec)  # vLLM changes its own
        found = stock(vllm_config, kv_cache_spec)
        check(vllm_config, asked, found)
        return found

    group.kvthrift = True  # type: ignore[attr-defined]
    module.get_kv_cache_groups = group


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
    """Those of ``ids`` whose requests the worker still knows, and that were not preempted."""
    if not _current:
        return set()
    runner, _ = _current[0]
    known = runner.requests if hasattr(runner, "requests") else runner.req_states.req_id_to_index
    return {name for name in ids if name in known and name not in _preempted}


def rows() -> Rows | None:
    """The batch that is being built; None outside of one (while vLLM profiles)."""
    if not _current:
        return None
    runner, batch = _current[0]
    if hasattr(runner, "req_states"):
        prompts = runner.req_states.prompt_len.np[batch.idx_mapping_np]
        ids, done = batch.req_ids, batch.num_computed_tokens_np
    else:
        some = slice(batch.num_reqs)
        ids, prompts, done = batch.req_ids[some], batch.num_prompt_tokens[some], batch.num_computed_tokens_cpu[some]
    _preempted.difference_update(ids)
    return Rows(tuple(ids), tuple(prompts.tolist()), tuple(done.tolist()))
