"""What a model says if each token sees exactly the entries that a server's layers said they had, head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvthrift.integrations.transformers.embedded import embedded_path

BLOCK = 32
Record = dict[int, list[tuple[int, int, list[Tensor]]]]  # layer -> [(tokens then, full blocks, positions of each head)]
_shown: list[Record] = []


def visible(events: list[tuple[int, int, list[Tensor]]], heads: int, tokens: int) -> Tensor:
    """Which entries each token sees, ``[H, T, T]``: its own past, less what was dropped before it was read."""
    out = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(heads, 1, 1)
    for seen, full, positions in events:
        out[:, seen:, : full * BLOCK] = False
        for head, kept in enumerate(positions):
            out[head, seen:, kept.long()] = True
    return out


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    allowed = visible(_shown[0].get(module.layer_idx, []), heads, k.shape[2]).repeat_interleave(group, 0)
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def log_probabilities(ids: list[int], tokens: list[int], record: Record) -> list[float]:
    """Of each token of an answer behind its prompt, under ``record``; an empty one sees everything."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("replayed", _attend)
    _shown[:] = [record]
    model = AutoModelForCausalLM.from_pretrained(
        str(embedded_path()), dtype=torch.float32, attn_implementation="replayed"
    ).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + tokens[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
    found = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [float(x) for x in found]
