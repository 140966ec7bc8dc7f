"""Caches of 4 bits by token, as vLLM writes and reads them: a plain twin, and calls of its own functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvthrift.integrations.vllm.cells import ROTATED, Cells, cell_bytes, cells_of
from kvthrift.integrations.vllm.gpu_pages import Pages

HEADS, SIZE, BLOCKS = 3, 16, 6
TOKENS = 72  # with the heads a multiple of 8: on a GPU vLLM rotates what is over wrongly (vllm#57014)


def hadamard(dim: int) -> Tensor:
    """Of each pair of indices: the parity of the bits that both have."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])


def written(x: Tensor, flips: Tensor) -> Tensor:
    """Cells ``[n, D / 2 + 4]`` of numbers ``[n, D]``, as vLLM's kernel writes them."""
    dim = x.shape[1]
    y = (x * flips) @ hadamard(dim)
    low, high = y.aminmax(dim=1, keepdim=True)
    scale = ((high - low) / 15.0).clamp_(min=1e-6)
    zero = _rounded(-low / scale)
    codes = _rounded(y * (1.0 / scale) + zero)
    behind = (scale.view(torch.int32) & ~15) | zero
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return torch.cat((pairs, behind.contiguous().view(torch.uint8)), 1)


def _rounded(x: Tensor) -> Tensor:
    """To the next whole number from 0 to 15, halves away from zero."""
    return (x + x.sign() * 0.5).int().clamp(0, 15)


def form(back: Tensor) -> Cells:
    return cells_of(ROTATED, None, None, torch.float32, back)


def off(found: Tensor, x: Tensor) -> float:
    return float((found - x).norm() / x.norm())


def by_block(scales: Tensor, step: int) -> Tensor:
    """Scales ``[P, size, 1]`` of pages as vLLM sees them, ``[B, size, H]``."""
    page, token, _ = scales.stride()
    return scales.as_strided((BLOCKS, SIZE, HEADS), (page * step, token, page))


def layer(write: Any, back: Tensor, layers: int = 1) -> tuple[Pages, Tensor, list[Tensor]]:
    """A layer's pages in which vLLM wrote 72 tokens, the blocks they are in, and keys and values ``[n, H, D]``.

    Args:
        write: vLLM's function.
        back: what undoes its rotation, ``[D, D]``.
        layers: whose pages lie side by side.
    """
    dim, device = back.shape[0], back.device
    width = cell_bytes(ROTATED, dim, torch.bfloat16)
    cache = torch.zeros(BLOCKS, layers, HEADS, SIZE, 2 * width, dtype=torch.uint8, device=device)[:, -1]
    pages, blocks = Pages(cache, form(back)), torch.tensor([4, 1, 5, 2, 3], device=device)
    numbers = [torch.randn(TOKENS, HEADS, dim) * torch.rand(TOKENS, HEADS, 1) * 5 for _ in "kv"]
    numbers = [part + torch.randn(HEADS, dim) for part in numbers]
    numbers = [part.to(device) for part in numbers]
    scales = [by_block(part, pages.step) for part in pages.scales()]
    slots = (blocks[:, None] * SIZE + torch.arange(SIZE, device=device)).flatten()[:TOKENS]
    write(
        *numbers,
        *cache.transpose(1, 2).split(width, -1),
        slots,
        k_scale_cache=scales[0],
        v_scale_cache=scales[1],
    )
    return pages, blocks, numbers


def attended(attend: Any, mode: Any, pages: Pages, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What vLLM's kernel and plain attention say of queries ``[H, 2, D]`` to heads of unequal lengths.

    Args:
        attend: vLLM's function.
        mode: its name of the cache.
        pages, blocks: of :func:`layer`.
    """
    device = blocks.device
    queries = torch.randn(HEADS, 2, pages.dim).to(device)
    lengths = torch.tensor([TOKENS, 33, 5], dtype=torch.int32, device=device)
    out = torch.zeros_like(queries)
    attend(
        q=queries,
        k=pages.keys,
        v=pages.values,
        out=out,
        cu_seqlens_q=torch.arange(HEADS + 1, dtype=torch.int32, device=device),
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=TOKENS,
        softmax_scale=0.125,
        causal=True,
        window_size=(-1, -1),
        block_table=torch.stack(pages.of(blocks)).int(),
        softcap=0.0,
        kv_quant_mode=mode,
        **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
        **dict(zip(("k_scale_cache", "v_scale_cache"), pages.scales(), strict=True)),
    )
    wanted = []
    for asked, keys, values, length in zip(queries, *pages.read(pages.of(blocks)), lengths.tolist(), strict=True):
        weights = (asked @ keys[:length].T * 0.125).softmax(-1)
        wanted.append(weights @ values[:length])
    return out, torch.stack(wanted)
