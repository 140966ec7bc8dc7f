"""Counters beside vLLM's own at ``/metrics``, through its plugin group ``vllm.stat_logger_plugins``.

What a request gave back follows from its lengths alone (``plan.py``), so that it is counted where requests end, without
a message from the scheduler. Imported only inside vLLM.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.cells import cell_bytes
from kvthrift.integrations.vllm.contract import check_served
from kvthrift.integrations.vllm.freed import Freed, freed_by
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.integrations.vllm.worker import settings_of

NAMES = {
    "kvthrift:requests_compressed": "Finished requests of which blocks were given back while they ran.",
    "kvthrift:blocks_freed": "KV cache blocks that finished requests gave back while they ran.",
    "kvthrift:bytes_freed": "Bytes of those blocks, over all layers.",
}


class KvthriftStats(AggregateStatLoggerBase):
    """Counts what finished requests gave back; nothing where the engine was not configured for kvthrift.

    vLLM does not report aborted requests to its loggers, so they are not counted; of a preempted request only what it
    gave back in the end is. Where steps are scheduled ahead blocks come back a step later, and an answer that was cut
    at its limit has had one step less.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._config, self._settings = vllm_config, _settings(vllm_config)
        if self._settings is not None:
            self._counters = {name: _counter(name, text) for name, text in NAMES.items()}

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM once a step."""
        settings = self._settings
        if settings is None or iteration_stats is None:
            return
        labels = (self._config.model_config.served_model_name, str(engine_idx))
        for one in iteration_stats.finished_requests:
            late = self._config.scheduler_config.async_scheduling and str(one.finish_reason) == "length"
            found = self._freed(settings, one.num_prompt_tokens, one.num_generation_tokens - int(late))
            for name, amount in zip(NAMES, (int(found.blocks > 0), found.blocks, found.bytes), strict=True):
                self._counters[name].labels(*labels).inc(amount)

    def _freed(self, settings: Settings, prompt: int, generated: int) -> Freed:
        model, cache = self._config.model_config, self._config.cache_config
        block, cell = cache.block_size, cell_bytes(cache.cache_dtype, model.get_head_size(), model.dtype)
        size = 2 * cell * model.get_total_num_kv_heads() * block
        return freed_by(settings.policies, prompt, generated, block=block, block_bytes=size)

    def log_engine_initialized(self) -> None:
        """Nothing: the worker has said it."""


def _settings(config: Any) -> Settings | None:
    try:
        check_served()
    except UnsupportedModelError:  # the plugin has said so
        return None
    return settings_of(config)


@cache
def _counter(name: str, text: str) -> Counter:
    """This process's counter of a name: an engine may be started twice in it."""
    return Counter(name, text, ("model_name", "engine"))
