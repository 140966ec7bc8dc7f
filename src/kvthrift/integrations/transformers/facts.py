"""What kvthrift asks of a transformers model: its rotary embedding, output projections, and who it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvthrift.core import ModuleFacts, Rope
from kvthrift.errors import MissingSignalError, UnsupportedModelError

_HALF_SPLIT = (
    "arcee", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt_neox", "granite", "granitemoe", "llama",
    "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj", "wo")


def module_facts(module: nn.Module) -> ModuleFacts:
    """Facts of one attention module, looked up only when asked for."""
    return ModuleFacts(output_weight=lambda: output_weight(module), rope=lambda: rope(module))


def output_weight(module: nn.Module) -> Tensor:
    """The output projection as ``[HG, Dv, hidden]``.

    Raises:
        MissingSignalError: the module has none that kvthrift recognises.
    """
    for name in _PROJECTIONS:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(projection, nn.Linear) and isinstance(weight, Tensor) and weight.is_floating_point():
            dim = head_dim(module)
            return weight.detach().t().reshape(-1, dim, weight.shape[0])
    raise MissingSignalError(
        f"{type(module).__name__} has no output projection that kvthrift can read (a plain linear layer named one of "
        f"{', '.join(_PROJECTIONS)}), which this recipe weighs values with. Use a method without it."
    )


def head_dim(module: nn.Module) -> int:
    """Dim of one attention head."""
    found = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if isinstance(found, int):
        return found
    config: Any = module.config
    return int(config.hidden_size // config.num_attention_heads)


def rope(module: nn.Module) -> Rope:
    """The rotary embedding of the module's model.

    Raises:
        MissingSignalError: the model's is not known to be static and in the half-split convention.
    """
    config: Any = module.config
    if config.model_type not in _HALF_SPLIT:
        raise MissingSignalError(
            f"kvthrift has not checked how {config.model_type} rotates its keys, and this recipe turns them. "
            "Use a method without the rotary embedding."
        )
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        kinds = getattr(config, "layer_types", None)
        parameters = dict(parameters[kinds[int(getattr(module, "layer_idx", 0))] if kinds else "full_attention"])
        layer_type: dict[str, Any] = {"layer_type": kinds[int(getattr(module, "layer_idx", 0))]} if kinds else {}
    else:
        layer_type = {}
    kind = parameters.get("rope_type", "default")
    if kind not in _STATIC_ROPE or "rope_theta" not in parameters:
        raise MissingSignalError(
            f"{config.model_type} uses rope type {kind!r}, which changes with the text's length; this recipe needs a "
            "static one. Use a method without the rotary embedding."
        )
    if kind == "default":
        share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        dim = int(head_dim(module) * share)
        steps = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return Rope(1.0 / (parameters["rope_theta"] ** steps))
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **layer_type)
    return Rope(inv_freq, float(factor))


def refuse(config: PreTrainedConfig) -> None:
    """Refuse architectures whose caches are not plain keys and values.

    Raises:
        UnsupportedModelError: with the reason.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; kvthrift compresses decoder-only models. Use the "
            "model's own cache."
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{text.model_type} is set to attend in both directions, so what it has read changes with what comes. Use "
            "it without a cache."
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{text.model_type} uses multi-head latent attention, whose cache is one latent vector a token and "
            "not keys and values per head. Use the model's own cache."
        )
    if not hasattr(text, "num_attention_heads"):
        raise UnsupportedModelError(f"{text.model_type} has no attention heads, so there is no cache to compress.")


_IDENTITY = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "layer_types", "sliding_window", "rope_parameters",
)  # fmt: skip


def config_fingerprint(config: PreTrainedConfig) -> str:
    """A short hash of what decides a cache's shape and meaning; weights are not looked at."""
    text = config.get_text_config(decoder=True)
    identity = {name: _spelled_once(getattr(text, name, None)) for name in _IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _spelled_once(value: Any) -> Any:
    """The same for 100000 and 100000.0: configs of one model differ in that."""
    if isinstance(value, dict):
        return {str(key): _spelled_once(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled_once(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The attention module of every layer, by the model's own layer number."""
    return {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }


def weights_fingerprint(config: PreTrainedConfig, modules: dict[int, nn.Module]) -> str:
    """A short hash of a config and of numbers sampled from the given attention modules' parameters."""
    digest = hashlib.sha256(config_fingerprint(config).encode())
    for number, module in sorted(modules.items()):
        for name, parameter in sorted(module.named_parameters()):
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
            digest.update(f"{number}.{name}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
