"""The attention function and mask function that transformers calls for ``attn_implementation="kvthrift"``.

Registered with transformers' public interfaces; nothing is patched. A key tensor that came out of a kvthrift cache
carries its layer's handle; without one, attention is transformers' own sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvthrift.errors import KvthriftError, MaskError, UnsupportedModelError

NAME = "kvthrift"
HANDLE = "kvthrift_layer"

_REFUSED = {
    "softcap": "caps its attention logits",
    "s_aux": "adds learned sink logits",
    "sinks": "adds learned sink logits",
}
_REFUSED_WITH_CACHE = {"position_bias": "adds a learned position bias to its logits"}

_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Have torch.compile call ``function`` as it is: what it does to a cache is book-keeping, not arithmetic."""
    return cast(_F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Handle(Protocol):
    """What a key tensor carries: the cache layer that attends."""

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention ``[B, HG, Q, Dv]`` of the queries over the cache and the keys just brought."""

    def discard(self) -> None:
        """The keys just brought will not be attended to."""


@untraced
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface asks.

    Args:
        module: the model's attention module.
        query, key, value: ``[B, HG, Q, D]``, ``[B, H, T, D]``, ``[B, H, T, Dv]``.
        attention_mask: what :func:`mask` returned: None, a padding mask ``[B, T]`` or a full mask ``[B, 1, Q, T]``.
        scaling: softmax scale; one over the square root of D by default.

    Returns:
        ``[B, Q, HG, Dv]`` and None (weights are not returned).

    Raises:
        UnsupportedModelError: the layer's attention is not plain softmax attention.
        MaskError: the mask is neither causal nor padding.
    """
    handle = cast("Handle | None", getattr(key, HANDLE, None))
    if handle is None:
        _refuse(module, kwargs, _REFUSED)
        return _without_cache(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    try:
        _check(module, attention_mask, dropout, kwargs)
    except KvthriftError:
        handle.discard()
        raise
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = handle.attend(module, query, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, kwargs: dict[str, Any], refused: dict[str, str]) -> None:
    for name, why in refused.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} {why} ({name}), which kvthrift does not compute, so its cache cannot be "
                "compressed here. Use the model's own cache and attention."
            )


def _check(module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what a compressed cache cannot honour."""
    _refuse(module, kwargs, _REFUSED | _REFUSED_WITH_CACHE)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise MaskError(
            f"the attention mask has shape {tuple(attention_mask.shape)}: kvthrift attends causally over real "
            "tokens and cannot honour another pattern. Pass a padding mask [batch, tokens], or no mask."
        )
    if kwargs.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends within a sliding window that its config does not declare per layer. Use "
            "the model's own cache."
        )
    if dropout and module.training:
        raise UnsupportedModelError("attention dropout is on: a compressed cache is for inference. Call model.eval().")


def _without_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Transformers' own sdpa, after spelling out the causal mask that :func:`mask` left implicit."""
    length, total = query.shape[2], key.shape[2]
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
    if (attention_mask is not None and attention_mask.ndim == 2) or (
        attention_mask is None and causal and 1 < length != total
    ):
        steps = torch.arange(total, device=query.device)
        full = (steps <= steps[total - length :, None])[None, None]  # [1, 1, Q, T]
        attention_mask = full if attention_mask is None else full & attention_mask[:, None, None, -total:]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@untraced
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for one forward pass, as transformers' mask interface asks.

    Plain causal attention needs none: the result is None where all tokens are real, else the padding mask
    ``[B, kv_length]``. Every other pattern (sliding layers, images, packed sequences, static caches) gets the full
    mask of sdpa, which layers left whole use and kvthrift's layers refuse.
    """
    plain = mask_function is causal_mask_function and local_size is None
    if not plain or not isinstance(q_offset, int) or kv_offset or kv_length != q_offset + q_length:
        if 1 < q_length != kv_length:  # a static cache's first pass: sdpa would leave out a mask that we cannot guess
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    if attention_mask is None or (bool(attention_mask.all()) and attention_mask.shape[-1] == kv_length):
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise MaskError(
            f"the padding mask has shape {tuple(attention_mask.shape)}, but {batch_size} sequences of "
            f"{kv_length} tokens are read. Pass attention_mask for all columns, cached and new."
        )
    return attention_mask


def register() -> None:
    """Make ``attn_implementation="kvthrift"`` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
