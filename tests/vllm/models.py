"""Small models with nobody's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvthrift.integrations.transformers.embedded import embedded_path


def random_model(folder: Path) -> str:
    """A Llama with eight KV heads and nobody's weights."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(str(embedded_path()))
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    sizes |= {"head_dim": 64, "intermediate_size": 1024, "tie_word_embeddings": False, "initializer_range": 0.08}
    for name, size in sizes.items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(embedded_path())).save_pretrained(folder)
    return str(folder)


def mixed_model(folder: Path) -> str:
    """Three layers with a sliding window and one without, and nobody's weights."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(str(embedded_path()))
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        sliding_window=512,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        query_pre_attn_scalar=64,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
