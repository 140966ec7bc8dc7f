"""What a model says if each token sees exactly the entries that a server's layers said they had, head by head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvthrift.integrations.transformers.embedded import embedded_path

BLOCK = 32
Record = dict[int, list[tuple[int, int, list[Tensor]]]]  # layer -> [(tokens then, full blocks, positions of each head)]
Rounding = Callable[[Tensor], Tensor]
_shown: list[tuple[Record, Rounding | None]] = []


def visible(events: list[tuple[int, int, list[Tensor]]], heads: int, tokens: int) -> Tensor:
    """Which entries each token sees, ``[H, T, T]``: its own past, less what was dropped before it was read."""
    out = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(heads, 1, 1)
    for seen, full, positions in events:
        out[:, seen:, : full * BLOCK] = False
        for head, kept in enumerate(positions):
            out[head, seen:, kept.long()] = True
    return out


def in_fp8(x: Tensor) -> Tensor:
    """The next number towards zero that fp8 has, as vLLM's CPU kernels store it."""
    near = x.to(torch.float8_e4m3fn)
    beyond = near.float().abs() > x.abs()
    return (near.view(torch.uint8) - beyond.byte()).view(torch.float8_e4m3fn).float()


def in_int8(x: Tensor) -> Tensor:
    """As in vLLM's Triton kernels with a scale for each token of a head."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-6)
    return (x / scale).round() * scale


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    record, rounding = _shown[0]
    k, v = (k, v) if rounding is None else (rounding(k), rounding(v))
    allowed = visible(record.get(module.layer_idx, []), heads, k.shape[2]).repeat_interleave(group, 0)
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def log_probabilities(
    ids: list[int], tokens: list[int], record: Record, rounding: Rounding | None = None
) -> list[float]:
    """Of each token of an answer behind its prompt, under ``record``; an empty one sees everything.

    Args:
        ids, tokens: of the prompt and the answer.
        record: what was kept.
        rounding: how keys and values ``[*, T, D]`` are written; None for as they are.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("replayed", _attend)
    _shown[:] = [(record, rounding)]
    model = AutoModelForCausalLM.from_pretrained(
        str(embedded_path()), dtype=torch.float32, attn_implementation="replayed"
    ).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + tokens[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
    found = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [float(x) for x in found]
