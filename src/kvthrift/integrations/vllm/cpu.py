"""The CPU backend: vLLM's own, with a builder that skips dropped blocks and a forward that moves what is kept.

Imported only inside vLLM.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvthrift.errors import CacheStateError, UnsupportedModelError
from kvthrift.integrations.vllm import worker
from kvthrift.integrations.vllm.compact import kept_tokens, prompt_view
from kvthrift.integrations.vllm.cpu_ragged import Batch, RaggedRows
from kvthrift.integrations.vllm.runner import rows, watch_runner
from kvthrift.integrations.vllm.settings import Settings

_DIGIT = 128  # numbers that even bfloat16 holds exactly


class KvthriftCPUBuilder(CPUAttentionMetadataBuilder):
    """Compressed rows look like shorter requests to the kernel."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.kvthrift = worker.settings_of(vllm_config) if hasattr(kv_cache_spec, "policy") else None
        if self.kvthrift is not None:
            watch_runner()

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's; the metadata also says which prompts end in this step."""
        common, settings = common_attn_metadata, self.kvthrift
        due: list[worker.Due] = []
        batch = rows() if settings is not None else None
        if settings is not None and batch is not None:
            starts = common.query_start_loc_cpu
            new, lengths = (starts[1:] - starts[:-1]).tolist(), common.seq_lens.tolist()
            count = min(len(batch.ids), common.num_reqs)
            dropped, due = worker.read_rows(batch, new[:count], lengths[:count], self.block_size, settings)
            if settings.check:
                _check(common.block_table_tensor, dropped)
            if dropped.any() and settings.recipe.heads.uniform:
                dropped = torch.nn.functional.pad(dropped, (0, common.num_reqs - count))
                table, seen = worker.shifted(common.block_table_tensor, common.seq_lens, dropped, self.block_size)
                common = common.replace(block_table_tensor=table, seq_lens=seen)
        found = super().build(common_prefix_len, common, fast_build)
        found.kvthrift = due
        if batch is not None and settings is not None and not settings.recipe.heads.uniform:
            found.kvthrift_batch = Batch(
                batch.ids, common.block_table_tensor, common.seq_lens, common.query_start_loc_cpu
            )
        return found


def _check(table: Tensor, dropped: Tensor) -> None:
    """What is read must never be a block that was given back (block 0, the null block)."""
    for row, count in enumerate(dropped.tolist()):
        if count and not bool(table[row, count]):
            raise CacheStateError(
                f"row {row} of a batch reads a block that the scheduler took back: the two do not agree on what was "
                "dropped."
            )


class KvthriftCPUImpl(CPUAttentionBackendImpl):
    """vLLM's kernel; after the step that ends a prompt, what each head keeps is moved into its last blocks."""

    _orders: ClassVar[dict[Any, tuple[Tensor, Tensor]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        settings = None if config is None else worker.settings_of(config)
        if settings is not None and self.sliding_window == -1:
            _refuse(self)
        KvthriftCPUBackend.settings = settings
        self.ragged = RaggedRows()

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
        settings, batch = KvthriftCPUBackend.settings, getattr(attn_metadata, "kvthrift_batch", None)
        if batch is not None and self.ragged.holds(batch):
            out = self.ragged.attend(self, layer, query, kv_cache, batch, output)
        else:
            out = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if settings is not None:
            for due in getattr(attn_metadata, "kvthrift", ()):
                self._compact(settings, layer, query, kv_cache, attn_metadata, due)
        return out

    def _compact(
        self, settings: Settings, layer: Any, query: Tensor, cache: Tensor, metadata: Any, due: worker.Due
    ) -> None:
        blocks, heads, size, double = cache.shape
        dim, prompt, found = double // 2, due.prompt, due.plan
        keys, values = cache.view(blocks, heads, size * 2, dim).chunk(2, dim=2)
        own = metadata.block_table[due.row, : -(-prompt // size)].long()
        k, v = (
            self._plain(part[own], order, size)[:, :prompt]
            for part, order in zip((keys, values), self._order(layer.isa, size, dim, cache.dtype), strict=True)
        )
        first = int(metadata.query_start_loc[due.row])
        window = max(1, min(settings.recipe.needs.window, prompt - due.done))
        last = query[first + prompt - due.done - window : first + prompt - due.done]
        view = prompt_view(
            k,
            v,
            last.view(window, -1, dim).transpose(0, 1),
            scale=float(self.scale),
            layer=_index(layer.layer_name),
            layers=settings.layers,
        )
        kept = kept_tokens(settings.recipe, view, block=size, full=found.full, kept=found.kept)
        pages = own[found.dropped : found.full]
        if settings.recipe.heads.uniform:
            index = torch.stack(kept)[..., None].expand(-1, -1, dim)
            k, v = (part.gather(1, index).transpose(0, 1).contiguous() for part in (k, v))
        else:  # a block [H, size, 2D] is H pages, and each head takes as many of them as it needs
            k, v = (torch.cat([part[h, tokens] for h, tokens in enumerate(kept)])[:, None] for part in (k, v))
            keys, values = cache.view(blocks * heads, 1, size * 2, dim).chunk(2, dim=2)
            pages = (pages[:, None] * heads + torch.arange(heads)).flatten()
            counts = [len(tokens) // size for tokens in kept]
            self.ragged.remember(metadata.kvthrift_batch.ids[due.row], prompt, found.full, list(pages.split(counts)))
        slots = (pages[:, None] * size + torch.arange(size)).view(-1)
        ops.cpu_attn_reshape_and_cache(
            k.contiguous(),
            v.contiguous(),
            keys,
            values,
            slots,
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    @staticmethod
    def _plain(stored: Tensor, order: Tensor, size: int) -> Tensor:
        """Blocks as kernels keep them ``[n, H, size, D]`` -> tokens in order ``[H, n * size, D]``."""
        n, heads, _, dim = stored.shape
        tokens = stored.reshape(n, heads, size * dim)[..., order].view(n, heads, size, dim)
        return tokens.transpose(0, 1).reshape(heads, n * size, dim)

    @classmethod
    def _order(cls, isa: Any, size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where in a block the kernels of this machine put each number: learnt by storing numbered tokens."""
        known = (isa, size, dim, dtype)
        if known not in cls._orders:
            block = torch.zeros(1, 1, 2 * size, dim, dtype=dtype)
            keys, values = block.chunk(2, dim=2)
            numbers, slots = torch.arange(size * dim).view(size, 1, dim), torch.arange(size)
            places: list[list[Tensor]] = [[], []]
            for digit in (numbers // _DIGIT, numbers % _DIGIT):
                x = digit.to(dtype)
                ops.cpu_attn_reshape_and_cache(x, x, keys, values, slots, isa)
                for found, part in zip(places, (keys, values), strict=True):
                    found.append(part.reshape(-1).long())
            cls._orders[known] = tuple((high * _DIGIT + low).argsort() for high, low in places)  # type: ignore[assignment]
        return cls._orders[known]


def _refuse(impl: CPUAttentionBackendImpl) -> None:
    """Refuse a layer whose logits are not plain: neither scores nor the kernel's unequal heads know of that.

    Raises:
        UnsupportedModelError: with what it has.
    """
    has = {"a logit soft-cap": impl.logits_soft_cap, "ALiBi": impl.alibi_slopes, "learned sinks": impl.sinks}
    found = [name for name, value in has.items() if value is not None and (isinstance(value, torch.Tensor) or value)]
    if found:
        raise UnsupportedModelError(
            f"this model's attention has {' and '.join(found)}, which kvthrift does not compress inside vLLM."
        )


def _index(name: str) -> int:
    """A layer's index among the model's layers, from its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


class KvthriftCPUBackend(CPUAttentionBackend):
    """vLLM's CPU attention; stock wherever the engine was not configured for kvthrift."""

    settings: ClassVar[Settings | None] = None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give full-attention layers the policy."""
        from kvthrift.integrations.vllm.spec import compressed

        return spec if cls.settings is None else compressed(spec, cls.settings.policy)

    @staticmethod
    def get_impl_cls() -> type[KvthriftCPUImpl]:
        """Ours."""
        return KvthriftCPUImpl

    @staticmethod
    def get_builder_cls() -> type[KvthriftCPUBuilder]:
        """Ours."""
        return KvthriftCPUBuilder
