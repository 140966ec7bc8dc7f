"""Heads of unequal lengths with vLLM's own CPU kernel: every head of every request is a sequence of its own.

A block ``[H, size, 2D]`` is H head-pages; page ``block * H + head``. The cache is viewed as pages of one head each, and
the kernel is called with a table and a length for each (request, head). Imported only inside vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from kvthrift.integrations.vllm.runner import unfinished


@dataclass(frozen=True)
class Batch:
    """A step's requests: ids, block table ``[R, width]``, lengths ``[R]``, and where each one's queries begin."""

    ids: tuple[str, ...]
    table: Tensor
    lengths: Tensor
    starts: Tensor


@dataclass(frozen=True)
class _Kept:
    """Of a compressed request: its prompt's tokens and full blocks, and each head's pages."""

    prompt: int
    full: int
    pages: list[Tensor]


class RaggedRows:
    """What one layer keeps of each request, head by head."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def remember(self, request: str, prompt: int, full: int, pages: list[Tensor]) -> None:
        """A request was compressed: head ``h`` owns ``pages[h]``, tokens from block ``full`` on are where they were."""
        self._kept[request] = _Kept(prompt, full, pages)

    def holds(self, batch: Batch) -> bool:
        """Whether any request of the batch is compressed."""
        alive = unfinished(self._kept)
        self._kept = {name: kept for name, kept in self._kept.items() if name in alive}
        return any(name in self._kept for name in batch.ids)

    def attend(self, impl: Any, layer: Any, query: Tensor, cache: Tensor, batch: Batch, output: Tensor) -> Tensor:
        """Attention ``[tokens, HG, D]`` of all rows of the batch, written to ``output``."""
        blocks, heads, size, double = cache.shape
        dim, group, count = double // 2, impl.num_queries_per_kv, len(batch.ids)
        lengths, starts = batch.lengths[:count].tolist(), batch.starts[: count + 1].tolist()
        tables: list[Tensor] = []
        sizes, order, news = [], [], []
        for row, name in enumerate(batch.ids):
            length, new = lengths[row], starts[row + 1] - starts[row]
            own = batch.table[row, : -(-length // size)].long()
            kept = self._kept.get(name)
            if kept is not None and length - new < kept.prompt:
                kept = None  # preempted, and read anew
            for head in range(heads):
                if kept is None:
                    tables.append(own * heads + head)
                    sizes.append(length)
                else:
                    tables.append(torch.cat((kept.pages[head], own[kept.full :] * heads + head)))
                    sizes.append(len(kept.pages[head]) * size + length - kept.full * size)
                order.append(torch.arange(starts[row], starts[row + 1]) * heads + head)
                news.append(new)
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(torch.int32)
        seen, places = torch.tensor(sizes, dtype=torch.int32), torch.cat(order)
        begins = torch.tensor([0, *news], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tokens = starts[-1]
        asked = query[:tokens].reshape(tokens * heads, group, dim)[places].contiguous()
        found = torch.empty_like(asked)
        keys, values = cache.view(blocks * heads, 1, size * 2, dim).chunk(2, dim=2)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=count * heads,
            num_heads=group,
            num_kv_heads=1,
            head_dim=dim,
            seq_lens=seen,
            dtype=query.dtype,
            query_start_loc=begins,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=True,
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
        )
        output[:tokens].view(tokens * heads, group, dim)[places] = found
        return output
