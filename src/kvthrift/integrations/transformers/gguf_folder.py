"""Turns a Llama GGUF file into a Hugging Face model folder: bf16 safetensors, configs and a tokenizer.

Knows nothing of where the file comes from or where the folder is kept, and does without transformers'
own GGUF reader: that one needs another package, and multiplies packed weights at every step.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from kvthrift.errors import UnsupportedModelError

Progress = Callable[[str, float], None] | None
"""Told what is being done, in words for a person, and the fraction of that stage that is done (0 to 1)."""

WEIGHTS_DTYPE = torch.bfloat16
WEIGHTS_FILE = "model.safetensors"

# GGUF's names of a Llama's modules, and transformers' names of the same.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KIND_KEYS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
CONTROL_TOKEN, USER_TOKEN = 3, 4


def write_model_folder(source: Path, folder: Path, progress: Progress = None) -> None:
    """Write the model in the GGUF file `source` into the existing, empty `folder`.

    Raises `UnsupportedModelError` for another architecture or tokenizer than a Llama with SmolLM's tokenizer,
    `OSError` when the disk is too small, and `ValueError`, `KeyError` or `IndexError` for a damaged file.
    """
    if progress:
        progress("Reading the packed model", 0.0)
    reader = GGUFReader(source, "c")  # copy-on-write: torch wants arrays it may write to
    metadata = _Metadata(reader)
    kind = [metadata[key] for key in KIND_KEYS]
    if kind != ["llama", "gpt2", "smollm"]:
        raise UnsupportedModelError(
            f"{source.name} holds a model of kind {'/'.join(kind)}, and only llama/gpt2/smollm can be "
            "unpacked. Give the folder or hub id of the original model instead."
        )
    _require_room(reader, folder)
    config = _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights = _weights(reader, config, progress)
    if progress:
        progress("Writing the model", 0.0)
    config.save_pretrained(folder)
    _generation_config(metadata).save_pretrained(folder)
    _tokenizer(metadata).save_pretrained(folder)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes 0600, the others follow the umask
    if progress:
        progress("Writing the model", 1.0)


class _Metadata:
    """The key-value part of a GGUF file, read on demand: the vocabulary alone is 49152 strings."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()


def _require_room(reader: GGUFReader, folder: Path) -> None:
    needed = sum(int(tensor.n_elements) for tensor in reader.tensors) * WEIGHTS_DTYPE.itemsize + 16 * 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free", str(folder))


def _config(metadata: _Metadata, tied: bool) -> LlamaConfig:
    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=WEIGHTS_DTYPE,
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        # Kept as a 32-bit float in the file: 9.999999747378752e-06 was 1e-05.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _generation_config(metadata: _Metadata) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: GGUFReader, config: LlamaConfig, progress: Progress) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or 0}
    weights: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        if progress:
            progress("Unpacking the weights", done / len(reader.tensors))
        name, module = _name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        if module in heads:
            weight = split_rotary_pairs(weight, heads[module])
        weights[name] = weight.to(WEIGHTS_DTYPE).contiguous()
    if progress:
        progress("Unpacking the weights", 1.0)
    return weights


def _name(gguf_name: str) -> tuple[str, str]:
    """transformers' name of a tensor, and GGUF's name of its module."""
    match gguf_name.split("."):
        case ["blk", layer, module, "weight"]:
            return f"model.layers.{layer}.{LAYER_NAMES[module]}.weight", module
        case [module, "weight"]:
            return f"{OUTER_NAMES[module]}.weight", module
    raise KeyError(gguf_name)


def split_rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from GGUF's order to transformers'.

    GGUF puts the two coordinates that rotate together side by side, transformers half a head apart.
    `weight` is `[heads * D, hidden]`, and so is the result.
    """
    rows, hidden = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, hidden)  # [heads, D/2, 2, hidden]
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _tokenizer(metadata: _Metadata) -> PreTrainedTokenizerFast:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"its vocabulary and merges disagree: {error}") from error
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL_TOKEN, USER_TOKEN):
            backend.add_tokens([AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
