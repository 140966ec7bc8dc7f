"""An attention backend that another plugin might put in the place of vLLM's."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend


class Rival(CPUAttentionBackend):
    """vLLM's own, under another name."""
