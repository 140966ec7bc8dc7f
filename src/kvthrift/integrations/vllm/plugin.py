"""The plugin that vLLM loads in each of its processes."""

from __future__ import annotations

import logging
import sys

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.contract import check_served
from kvthrift.integrations.vllm.runner import watch_groups
from kvthrift.integrations.vllm.settings import KEY

_BACKENDS = {
    "cpu": {"CPU_ATTN": "cpu.KvthriftCPUBackend"},
    "cuda": {
        "FLASH_ATTN": "gpu_flash.KvthriftFlashBackend",
        "TRITON_ATTN": "gpu_triton.KvthriftTritonBackend",
    },
}


def register() -> None:
    """Put kvthrift's backend in the place of vLLM's; it does what vLLM's does unless the engine's config asks for more.

    With a vLLM outside the tested range, or on a device that is not served, nothing is put anywhere; one line says so.

    Raises:
        UnsupportedModelError: such a vLLM, and the command line asks for kvthrift.
    """
    try:
        device = check_served()
    except UnsupportedModelError as error:
        if any(f'"{KEY}"' in word for word in sys.argv):
            raise
        logging.getLogger("kvthrift").warning("kvthrift stays out of vLLM: %s", error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvthrift.integrations.vllm import spec  # every process must know the spec it may be sent

    if device == "cuda":
        from vllm.v1.core import kv_cache_utils

        watch_groups(kv_cache_utils, spec.check_compressed)
    for name, backend in _BACKENDS[device].items():
        register_backend(AttentionBackendEnum[name], f"kvthrift.integrations.vllm.{backend}")
