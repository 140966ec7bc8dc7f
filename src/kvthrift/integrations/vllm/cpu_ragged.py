"""Heads of unequal lengths with vLLM's own CPU kernel: every head of every request is a sequence of its own.

The cache is viewed as pages of one head each (``cpu_pages.py``), and the kernel is called with a table and a length for
each (request, head). Imported only inside vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from kvthrift.integrations.vllm.books import Book
from kvthrift.integrations.vllm.cpu_pages import kernel_of
from kvthrift.integrations.vllm.worker import Step


def attend(
    impl: Any, layer: Any, query: Tensor, cache: Tensor, step: Step, books: Sequence[Book], output: Tensor
) -> Tensor:
    """Attention ``[tokens, HG, D]`` of all rows of a step, written to ``output``."""
    blocks, heads, size, double = cache.shape
    dim, group = double // 2, impl.num_queries_per_kv
    tables: list[Tensor] = []
    sizes, order, news = [], [], []
    for row, line, book in zip(step.rows, step.table.long(), books, strict=False):
        behind = line[book.full : -(-row.length // size)]
        new = row.length - row.done
        for head in range(heads):
            own = behind * heads + head
            tables.append(torch.cat((book.pages[head], own)) if book.pages else own)
            kept = len(book.pages[head]) if book.pages else 0
            sizes.append((kept - book.full) * size + row.length)
            order.append(torch.arange(row.first, row.first + new) * heads + head)
            news.append(new)
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(torch.int32)
    seen, places = torch.tensor(sizes, dtype=torch.int32), torch.cat(order)
    begins = torch.tensor([0, *news], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = len(places) // heads
    asked = query[:tokens].reshape(tokens * heads, group, dim)[places].contiguous()
    found = torch.empty_like(asked)
    keys, values = cache.view(blocks * heads, 1, size * 2, dim).chunk(2, dim=2)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(tables),
        num_heads=group,
        num_kv_heads=1,
        head_dim=dim,
        seq_lens=seen,
        dtype=query.dtype,
        query_start_loc=begins,
        causal=True,
        sliding_window_size=-1,
        isa=kernel_of(layer),
        enable_kv_split=True,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    ops.cpu_attention_with_kv_cache(
        query=asked,
        key_cache=keys,
        value_cache=values,
        output=found,
        query_start_loc=begins,
        seq_lens=seen,
        scale=impl.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
        k_scale=layer._k_scale_float,
        v_scale=layer._v_scale_float,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    output[:tokens].view(tokens * heads, group, dim)[places] = found
    return output
