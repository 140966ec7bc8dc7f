"""What the worker's model runner knows of each row of a batch. The one place that touches it.

vLLM hands a backend's metadata builder the batch, but not each request's prompt length or id. One private method of the
runner is wrapped to learn which runner is building (``contract.py`` lists it).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_METHOD = "_build_attention_metadata"
_current: list[Any] = []


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
