"""Tiny random models of every architecture the tests need: made in memory, the same weights in every run.

``tiny("llama")`` attends through kvthrift, ``tiny("llama", "sdpa")`` is the same model as transformers ships it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 199

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # large enough that what is attended to decides what is said
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # fully supported: every layer attends to everything
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 1}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None, "num_hidden_layers": 3}),
    # some layers are left whole
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    # plain keys and values, but a rotary embedding that kvthrift has not checked
    "cohere": ("CohereConfig", {}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None, "intermediate_size": None},
    ),
    # refused
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 16}),
    "t5": ("T5Config", {"d_kv": 16, "d_model": 64, "num_layers": 2, "num_heads": 4}),
    "bart": ("BartConfig", {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4, "num_key_value_heads": None}),
}


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of that architecture."""
    kind, own = _CONFIGS[name]
    values = {key: value for key, value in {**_PLAIN, **own, **changes}.items() if value is not None}
    values |= {key: None for key in ("eos_token_id", "bos_token_id", "sliding_window") if key not in values}
    made: PreTrainedConfig = getattr(transformers, kind)(**values)
    return made


def tiny(name: str, attention: str = "kvthrift", *, seed: int = 0) -> PreTrainedModel:
    """A tiny model in float32, shared by all tests: leave its weights and config as they are."""
    return _shared(name, attention, seed)


@cache
def _shared(name: str, attention: str, seed: int) -> PreTrainedModel:
    return build(config(name), attention, seed=seed)


def build(made: PreTrainedConfig, attention: str = "kvthrift", *, seed: int = 0) -> PreTrainedModel:
    """A model of that config with random weights, nobody else's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    return model.eval().float()


def text(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids ``[batch, length]``, never the padding token."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * length + batch)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
