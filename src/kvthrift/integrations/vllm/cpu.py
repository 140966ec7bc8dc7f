"""The CPU backend: vLLM's own, with a builder that skips dropped blocks and a forward that moves what is kept.

Imported only inside vLLM.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvthrift.integrations.vllm import worker
from kvthrift.integrations.vllm.books import Book, Books
from kvthrift.integrations.vllm.cpu_pages import Pages
from kvthrift.integrations.vllm.cpu_ragged import attend
from kvthrift.integrations.vllm.moves import compact
from kvthrift.integrations.vllm.plan import Plan
from kvthrift.integrations.vllm.runner import give_specs, layer_index, rows, unfinished, watch_runner
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.integrations.vllm.spec import compressed, freed


class KvthriftCPUBuilder(CPUAttentionMetadataBuilder):
    """Compressed rows look like shorter requests to the kernel."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.policy: Any = getattr(kv_cache_spec, "policy", None)
        self.kvthrift = None if self.policy is None else worker.settings_of(vllm_config)
        if self.kvthrift is not None:
            watch_runner()

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's; the metadata also says what the step means for each request."""
        common, settings = common_attn_metadata, self.kvthrift
        batch = rows() if settings is not None else None
        if settings is None or batch is None:
            return super().build(common_prefix_len, common, fast_build)
        count = min(len(batch.ids), common.num_reqs)
        starts, lengths = common.query_start_loc_cpu[: count + 1].tolist(), common.seq_lens[:count].tolist()
        found, dropped = worker.read_rows(batch, starts, lengths, self.block_size, self.policy)
        step = worker.Step(found, common.block_table_tensor)
        if settings.check:
            worker.check_blocks(step, self.policy, self.block_size, partial(freed, self.policy))
        if settings.recipe.heads.uniform and dropped.any():
            dropped = torch.nn.functional.pad(dropped, (0, common.num_reqs - count))
            table, seen = worker.shifted(common.block_table_tensor, common.seq_lens, dropped, self.block_size)
            common = common.replace(block_table_tensor=table, seq_lens=seen)
        metadata = super().build(common_prefix_len, common, fast_build)
        metadata.kvthrift = step
        return metadata


class KvthriftCPUImpl(CPUAttentionBackendImpl):
    """vLLM's kernel; after a step that makes blocks superfluous, what each head keeps is moved into the last ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        settings = None if config is None else worker.settings_of(config)
        if settings is not None:
            from vllm.model_executor.layers.attention import Attention

            give_specs(Attention, _give)
            if self.sliding_window == -1:
                worker.refuse_attention(self, "cpu")
        KvthriftCPUBackend.settings = settings
        self.books = Books()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, then the moves."""
        settings, step = KvthriftCPUBackend.settings, getattr(attn_metadata, "kvthrift", None)
        if settings is None or step is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if len(self.books) > len(step.rows):
            self.books.close(unfinished(self.books.names))
        books = [self.books.at(row.request, row.prompt, row.done) for row in step.rows]
        if any(book.pages for book in books):
            out = attend(self, layer, query, kv_cache, step, books, output)
        else:
            out = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        for row, line, book in zip(step.rows, step.table, books, strict=False):
            self._follow(settings, query, row, book)
            if row.due:
                pages = Pages(layer, kv_cache, self.kv_cache_dtype, query.dtype)
                self._compact(settings, layer_index(layer.layer_name), pages, line.long(), row.after, book)
        return out

    def _follow(self, settings: Settings, query: Tensor, row: worker.Row, book: Book) -> None:
        """Note that the row's new tokens are in the cache, and their queries if a scorer will ask for them."""
        book.seen = row.length
        window = settings.recipe.needs.window
        if window and (settings.policy.every is not None or row.done < row.prompt):
            behind = row.length - row.after.at if row.due else 0
            book.see(query[row.first : row.first + row.length - row.done], window + behind)
        else:
            book.queries.clear()

    def _compact(self, settings: Settings, index: int, pages: Pages, own: Tensor, found: Plan, book: Book) -> None:
        """Choose what stays of a row, and move it into the last of its full blocks."""
        if book.queries:
            queries = book.before(found.at, settings.recipe.needs.window)
        else:
            queries = pages.no_queries(self.num_heads)
        compact(settings, pages, own, found, book, queries, layer=index, scale=float(self.scale))


class KvthriftCPUBackend(CPUAttentionBackend):
    """vLLM's CPU attention; stock wherever the engine was not configured for kvthrift."""

    settings: ClassVar[Settings | None] = None

    @staticmethod
    def get_impl_cls() -> type[KvthriftCPUImpl]:
        """Ours."""
        return KvthriftCPUImpl

    @staticmethod
    def get_builder_cls() -> type[KvthriftCPUBuilder]:
        """Ours."""
        return KvthriftCPUBuilder


def _give(layer: Any, config: Any, spec: Any) -> Any:
    """A layer's cache spec, with its policy where it is of a kind that is compressed and its kernels are ours."""
    settings = worker.settings_of(config)
    if settings is None or spec is None or not issubclass(layer.get_attn_backend(), KvthriftCPUBackend):
        return spec
    return compressed(spec, settings, partial(layer_index, layer.layer_name))
