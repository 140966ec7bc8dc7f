"""vLLM's Triton backend with kvthrift in it. Imported only inside vLLM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
    unified_attention,
)

from kvthrift.integrations.vllm import gpu
from kvthrift.integrations.vllm.gpu_heads import HeadStep
from kvthrift.integrations.vllm.gpu_pages import Pages


class KvthriftTritonBuilder(gpu.Builder, TritonAttentionMetadataBuilder):
    """The Triton backend's metadata."""

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As vLLM's: short requests, or capturing takes long."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if self.kvthrift is not None:
            metadata.seq_lens.fill_(1)
        return metadata


class KvthriftTritonImpl(gpu.Impl, TritonAttentionImpl):
    """The Triton backend's kernel."""

    def attend(self, heads: HeadStep, pages: Pages, layer: Any, asked: Tensor, metadata: Any, found: Tensor) -> None:
        """See :class:`kvthrift.integrations.vllm.gpu.Impl`."""
        unified_attention(
            q=asked,
            k=pages.keys,
            v=pages.values,
            out=found,
            cu_seqlens_q=heads.starts,
            max_seqlen_q=heads.most,
            seqused_k=heads.sizes,
            max_seqlen_k=heads.longest,
            softmax_scale=self.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=heads.tables,
            softcap=0.0,
            kv_quant_mode=self._kv_quant_mode,
            **self._factors(pages, layer, asked, len(heads.sizes)),
        )

    def _factors(self, pages: Pages, layer: Any, asked: Tensor, sequences: int) -> dict[str, Tensor | None]:
        """What queries, keys and values are multiplied by."""
        if self._is_per_token_head_quant:
            none = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
            return {**none, **dict(zip(("k_scale_cache", "v_scale_cache"), pages.scales(), strict=True))}
        found = {f"{name}_descale": getattr(layer, f"_{name}_scale").expand(sequences, 1) for name in "kv"}
        return {**found, "q_descale": gpu.query_scale(layer, asked)}


class KvthriftTritonBackend(gpu.Backend, TritonAttentionBackend):
    """vLLM's own Triton kernels."""

    @staticmethod
    def get_impl_cls() -> type[KvthriftTritonImpl]:
        """Ours."""
        return KvthriftTritonImpl

    @staticmethod
    def get_builder_cls() -> type[KvthriftTritonBuilder]:
        """Ours."""
        return KvthriftTritonBuilder
