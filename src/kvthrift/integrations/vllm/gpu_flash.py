"""vLLM's FlashAttention backend with kvthrift in it. Imported only inside vLLM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvthrift.integrations.vllm import gpu
from kvthrift.integrations.vllm.gpu_heads import HeadStep
from kvthrift.integrations.vllm.gpu_pages import Pages

_SPLIT = 992  # sequences beyond which the kernel cannot decide by itself how to split them


class KvthriftFlashBuilder(gpu.Builder, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata."""


class KvthriftFlashImpl(gpu.Impl, FlashAttentionImpl):
    """FlashAttention's kernel."""

    def attend(self, heads: HeadStep, pages: Pages, layer: Any, asked: Tensor, metadata: Any, found: Tensor) -> None:
        """See :class:`kvthrift.integrations.vllm.gpu.Impl`."""
        flash_attn_varlen_func(
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
            window_size=[-1, -1],
            block_table=heads.tables,
            softcap=0.0,
            fa_version=self.vllm_flash_attn_version,
            num_splits=metadata.max_num_splits if len(heads.sizes) <= _SPLIT else 1,
            **({} if gpu.query_scale(layer, asked) is None else _factors(layer, len(heads.sizes))),
        )


def _factors(layer: Any, sequences: int) -> dict[str, Tensor]:
    """What queries, keys and values in fp8 are multiplied by."""
    return {f"{name}_descale": getattr(layer, f"_{name}_scale").expand(sequences, 1) for name in "qkv"}


class KvthriftFlashBackend(gpu.Backend, FlashAttentionBackend):
    """FlashAttention."""

    @staticmethod
    def get_impl_cls() -> type[KvthriftFlashImpl]:
        """Ours."""
        return KvthriftFlashImpl

    @staticmethod
    def get_builder_cls() -> type[KvthriftFlashBuilder]:
        """Ours."""
        return KvthriftFlashBuilder
