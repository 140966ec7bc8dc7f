"""The plugin that vLLM loads in each of its processes."""

from __future__ import annotations

import logging
import sys

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.contract import check_platform, check_version, installed
from kvthrift.integrations.vllm.settings import KEY


def register() -> None:
    """Put kvthrift's backend in the place of vLLM's; it does what vLLM's does unless the engine's config asks for more.

    With a vLLM outside the tested range, or on a GPU, nothing is put anywhere, and one line says so.

    Raises:
        UnsupportedModelError: such a vLLM, and the command line asks for kvthrift.
    """
    try:
        check_version(installed())
        check_platform()
    except UnsupportedModelError as error:
        if any(f'"{KEY}"' in word for word in sys.argv):
            raise
        logging.getLogger("kvthrift").warning("kvthrift stays out of vLLM: %s", error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvthrift.integrations.vllm import spec  # noqa: F401  (every process must know the spec it may be sent)

    register_backend(AttentionBackendEnum.CPU_ATTN, "kvthrift.integrations.vllm.cpu.KvthriftCPUBackend")
