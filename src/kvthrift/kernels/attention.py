"""The dispatch point: one function, the fastest correct implementation for what it is given.

Every path is checked against :func:`kvthrift.kernels.naive.attend`. Knows nothing of pages or recipes.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvthrift.core import AttentionOutput
from kvthrift.kernels import naive

_QUERY_BLOCK = 512
_LONG = 2048  # queries
_HALF = (torch.float16, torch.bfloat16)
_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    need_lse: bool = False,
    verbatim: bool = False,
) -> AttentionOutput:
    """Softmax attention of grouped query heads over one set of entries.

    Args:
        q: ``[B, HG, Q, D]``.
        k, v: ``[B, H, T, D]``, ``[B, H, T, Dv]``, finite everywhere (also where ``bias`` is ``-inf``).
        scale: factor on the logits.
        causal: query ``i`` sees entries ``0..i`` (needs Q = T, no bias).
        bias: ``[B, H, T]`` added to every query's logits, ``-inf`` where an entry is absent.
        lengths: ``[B, H]`` integers: ``bias`` does nothing but hide the entries from there on, so that it need not be
            read; None if it does more.
        need_lse: also return the log-sum-exp, to be merged with other parts.
        verbatim: on a CPU, make the very call that transformers' sdpa attention makes, so that half-precision rounding
            is the same too, even where another is faster; only without bias and lse.

    Returns:
        ``out [B, HG, Q, Dv]`` and, if asked for, ``lse [B, HG, Q]``.
    """
    if causal and (bias is not None or q.shape[2] != k.shape[2]):
        raise ValueError("causal attention takes as many queries as entries and no bias")
    if verbatim and bias is None and not need_lse and q.device.type == "cpu":
        gqa = q.shape[1] != k.shape[1]
        return AttentionOutput(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa))
    if not need_lse:
        return AttentionOutput(_output_only(q, k, v, scale, causal, bias))
    if q.device.type == "cpu":
        return _cpu_flash(q, k, v, scale, causal, bias)
    if bias is None and _has_flash(q, v):
        return _cuda_flash(q, k, v, scale, causal)
    if lengths is not None and _has_flash(q, v):
        return _cuda_ragged(q, k, v, scale, lengths)
    return _blocked(q, k, v, scale, causal, bias)


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """``[B, HG, Q, D] -> [B, H, GQ, D]``: the group's queries read each key once."""
    b, heads, length, dim = q.shape
    return q.reshape(b, kv_heads, heads // kv_heads * length, dim)


def _expand(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype)[:, :, None, :]


def _output_only(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    if causal:
        group = q.shape[1] // k.shape[1]
        if group > 1 and q.device.type == "cuda" and q.dtype not in _HALF:  # else a [Q, Q] matrix is stored
            k, v, group = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=group > 1)
    if bias is None and q.device.type == "cuda" and _has_flash(q, v):
        return _cuda_flash(q, k, v, scale, causal).out
    folded = _fold(q, k.shape[1])
    # cuDNN is left out: it plans for milliseconds whenever the number of entries is new, which is every step
    with sdpa_kernel(_UNPLANNED) if q.device.type == "cuda" else nullcontext():
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=_expand(bias, q), scale=scale)
    return out.reshape(*q.shape[:3], v.shape[-1])


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> AttentionOutput:
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") or q.shape[-1] != v.shape[-1]:
        return _blocked(q, k, v, scale, causal, bias)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    queries = q if causal else _fold(q, k.shape[1])
    out, lse = kernel(queries, k, v, 0.0, causal, attn_mask=_expand(bias, q), scale=scale)
    lse = lse.reshape(q.shape[:3])
    if bias is not None:  # the kernel says 0 where a query sees no entry
        nothing = bias.isneginf().all(dim=-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, HG]
        lse = lse.masked_fill(nothing[..., None], float("-inf"))
    return AttentionOutput(out.reshape(*q.shape[:3], v.shape[-1]), lse)


def _has_flash(q: Tensor, v: Tensor) -> bool:
    """Whether CUDA's flash attention takes these dtypes and head dims as they are."""
    dim = q.shape[-1]
    return q.dtype in _HALF and dim == v.shape[-1] and dim <= 256 and dim % 8 == 0


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's causal attention is worth its planning for each new length: it is the fastest on Hopper."""
    if q.shape[2] < _LONG or torch.cuda.get_device_capability(q.device)[0] < 9:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(params)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionOutput:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention  # takes grouped heads as they are
    out, lse = kernel(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    return AttentionOutput(out, lse.reshape(q.shape[:3]))  # [B, HG, Q, 1] or without the last dim, by version


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> AttentionOutput:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    if causal and _cudnn_takes(q, k, v):
        return _cudnn(q, k, v, scale)
    if causal:
        group = q.shape[1] // k.shape[1]
        queries, keys, values = q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    else:
        queries, keys, values = _fold(q, k.shape[1]), k, v
    out, lse = kernel(queries, keys, values, 0.0, causal, scale=scale)[:2]
    return AttentionOutput(out.reshape(*q.shape[:3], v.shape[-1]), lse[..., : queries.shape[2]].reshape(q.shape[:3]))


def _cuda_ragged(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor) -> AttentionOutput:
    """Every head of every sequence is a sequence to the kernel, which stops at the head's last entry."""
    (b, kv_heads, entries, dim), queries = k.shape, q.shape[1] // k.shape[1] * q.shape[2]
    rows = b * kv_heads
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    flat = [x.reshape(-1, 1, dim) for x in (_fold(q, kv_heads), k, v)]
    out, lse = torch.ops.aten._flash_attention_forward(
        *flat, starts * queries, starts * entries, queries, entries, 0.0, False, False, scale=scale,
        seqused_k=lengths.reshape(rows).int(),
    )[:2]  # fmt: skip
    empty = (lengths == 0).reshape(rows, 1)  # the kernel says plus infinity there
    lse = lse.reshape(rows, -1)[:, :queries].masked_fill(empty, float("-inf"))
    out = out.reshape(rows, queries, dim).masked_fill(empty[..., None], 0.0)
    return AttentionOutput(out.reshape(q.shape), lse.reshape(q.shape[:3]))


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> AttentionOutput:
    """The naive twin, a block of queries at a time, so that logits stay small."""
    outs, lses = [], []
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        block = q[:, :, start : start + _QUERY_BLOCK]
        stop = start + block.shape[2]
        if causal:
            ahead = torch.arange(stop, device=q.device)[None, :] > torch.arange(start, stop, device=q.device)[:, None]
            part = _causal_block(block, k[:, :, :stop], v[:, :, :stop], scale, ahead)
        else:
            part = naive.attend(block, k, v, scale=scale, bias=bias)
        outs.append(part.out)
        lses.append(part.lse)
    return AttentionOutput(torch.cat(outs, dim=2), torch.cat([x for x in lses if x is not None], dim=2))


def _causal_block(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> AttentionOutput:
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, dim=1).float(), v.repeat_interleave(group, dim=1).float()
    logits = (q.float() @ keys.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    return AttentionOutput(((logits - lse[..., None]).exp() @ values).to(q.dtype), lse)
