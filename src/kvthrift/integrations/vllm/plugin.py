"""The plugin that vLLM loads in each of its processes."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.contract import check_served
from kvthrift.integrations.vllm.runner import watch_groups
from kvthrift.integrations.vllm.settings import KEY

_HERE = "kvthrift.integrations.vllm."
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
    from vllm.v1.core import kv_cache_utils

    from kvthrift.integrations.vllm import spec  # every process must know the spec it may be sent

    taken = partial(_taken, AttentionBackendEnum, device)
    watch_groups(kv_cache_utils, partial(spec.check_compressed, taken=taken))
    found = taken()
    if found:
        logging.getLogger("kvthrift").warning(
            "kvthrift leaves %s to another plugin. Set VLLM_PLUGINS to the plugins that are wanted.", _said(found)
        )
    for name, backend in _BACKENDS[device].items():
        if name not in found:
            register_backend(AttentionBackendEnum[name], _HERE + backend)


def _taken(backends: Any, device: str) -> dict[str, str]:
    """Of the backends that are ours to replace, those that another plugin has replaced, and by what.

    Args:
        backends: vLLM's enumeration.
        device: vLLM's name of what it runs on.
    """
    paths = {name: backends[name].get_path() for name in _BACKENDS[device] if backends[name].is_overridden()}
    return {name: path for name, path in paths.items() if not path.startswith(_HERE)}


def _said(taken: dict[str, str]) -> str:
    return " and ".join(f"{name} ({path})" for name, path in taken.items())
