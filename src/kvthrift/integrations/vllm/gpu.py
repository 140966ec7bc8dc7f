"""What vLLM's GPU backends have in common: mixins for a builder, an implementation and a backend of any of them.

Imported only inside vLLM.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm import worker
from kvthrift.integrations.vllm.cells import ROTATED, Cells, cells_of
from kvthrift.integrations.vllm.gpu_heads import HeadStep
from kvthrift.integrations.vllm.gpu_pages import Pages
from kvthrift.integrations.vllm.gpu_queries import Queries
from kvthrift.integrations.vllm.gpu_rotation import rotation_back
from kvthrift.integrations.vllm.gpu_step import Step, Steps, extra
from kvthrift.integrations.vllm.runner import Rows, give_specs, layer_index, rows, watch_runner
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.integrations.vllm.spec import compressed, freed

_queries: list[tuple[Any, Queries | None]] = []  # the newest config, and where graphs leave its queries

if TYPE_CHECKING:  # mixins: what they are mixed with is vLLM's
    from vllm.v1.attention.backend import AttentionBackend as _Backend
    from vllm.v1.attention.backend import AttentionImpl as _Impl
    from vllm.v1.attention.backend import AttentionMetadataBuilder as _Builder
else:
    _Builder = _Impl = _Backend = object


def queries_of(
    config: Any, settings: Settings, heads: int, dim: int, device: torch.device | None = None
) -> Queries | None:
    """Where this process keeps queries; made while the first layer is, so that it counts as memory of the model."""
    if not _queries or _queries[0][0] is not config:
        found, rows = None, config.scheduler_config.max_num_seqs
        if settings.recipe.needs.window:
            found = Queries(
                settings.layers,
                rows,
                settings.recipe.needs.window,
                heads,
                dim,
                slots=rows if settings.policy.every is not None else 0,
                dtype=config.model_config.dtype,
                device=torch.empty(0).device if device is None else device,
            )
        _queries[:] = [(config, found)]
    return _queries[0][1]


def query_scale(layer: Any, query: Tensor) -> Tensor | None:
    """What a layer's queries are multiplied by where vLLM has written them in fp8; None where it has not."""
    found: Tensor | None = layer._q_scale if query.dtype.itemsize == 1 else None
    return found


def _cells(layer: Any, dtype: torch.dtype) -> Cells:
    name, scales = layer.impl.kv_cache_dtype, (layer._k_scale, layer._v_scale)
    back = rotation_back(layer.impl.head_size, layer._k_scale.device) if name == ROTATED else None
    return cells_of(name, *scales, dtype, back)


class Builder(_Builder):
    """Metadata over persistent buffers, in which compressed rows look like shorter requests."""

    supports_update_block_table: bool

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        policy = getattr(kv_cache_spec, "policy", None)
        settings = None if policy is None else worker.settings_of(vllm_config)
        self.kvthrift: Steps | None = None
        if settings is None or policy is None:
            return
        watch_runner()
        block = kv_cache_spec.block_size
        worker.refuse_split(vllm_config.cache_config.block_size, block)
        self.supports_update_block_table = False
        context = vllm_config.compilation_config.static_forward_context
        names = {layer_index(name): name for name in layer_names}
        impl = context[layer_names[0]].impl
        self.kvthrift = Steps(
            settings,
            policy,
            sorted(names),
            lambda layer: context[names[layer]].kv_cache,
            scale=float(impl.scale),
            block=block,
            slots=vllm_config.scheduler_config.max_num_seqs,
            length=vllm_config.model_config.max_model_len,
            query_heads=impl.num_heads,
            queries=queries_of(vllm_config, settings, impl.num_heads, impl.head_size, device),
            device=device,
            cells={n: _cells(context[name], vllm_config.model_config.dtype) for n, name in names.items()},
        )
        self._late = bool(vllm_config.scheduler_config.async_scheduling)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Graphs of steps with one token a request; vLLM's own where nothing is compressed."""
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if getattr(kv_cache_spec, "policy", None) is None or stock == AttentionCGSupport.NEVER:
            return stock
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: what requests share at their beginning may be gone."""
        return False if self.kvthrift is not None else super().use_cascade_attention(*args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's; what was made superfluous by the last step is seen to first."""
        if self.kvthrift is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return self._build(self.kvthrift, common_attn_metadata, rows())

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As vLLM's."""
        if self.kvthrift is None:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        return self._build(self.kvthrift, common_attn_metadata, None, capture=True)

    def _build(self, steps: Steps, common: Any, batch: Rows | None, *, capture: bool = False) -> Any:
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        if batch is not None and not batch.ids:
            batch = None
        if batch is not None and steps.settings.check:
            self._check(steps, common, batch, starts)
        entries, turn = steps.begin(batch, starts, common.block_table_tensor)
        heads: HeadStep | None = None
        if steps.ragged:
            heads = steps.apart(entries, starts, common.block_table_tensor, common.seq_lens, common.max_seq_len)
        else:
            table, lengths, longest = steps.shift(
                entries, common.block_table_tensor, common.seq_lens, common.max_seq_len
            )
            common = common.replace(
                block_table_tensor=table,
                seq_lens=lengths,
                max_seq_len=longest,
                _seq_lens_cpu=None,
                _num_computed_tokens_cpu=None,
                _num_computed_tokens_cache=None,
            )
        metadata = super().build(0, common, heads is not None)
        metadata.kvthrift = steps.of(None if capture else turn, heads)
        return metadata

    def _check(self, steps: Steps, common: Any, batch: Rows, starts: list[int]) -> None:
        lengths = [done + last - first for done, first, last in zip(batch.done, starts[:-1], starts[1:], strict=False)]
        found, _ = worker.read_rows(batch, starts, lengths, steps.block, steps.policy)
        step = worker.Step(found, common.block_table_tensor)
        worker.check_blocks(step, steps.policy, steps.block, partial(freed, steps.policy), late=self._late)


class Impl(_Impl):
    """vLLM's kernel; heads of unequal lengths are sequences of their own to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        settings = None if config is None else worker.settings_of(config)
        self._layers: dict[str, int] = {}
        self._pages: Pages | None = None
        self._ours = settings is not None
        if settings is None:
            return
        from vllm.model_executor.layers.attention import Attention

        give_specs(Attention, _give)
        if self.sliding_window == (-1, -1):
            worker.refuse_attention(self, "cuda")
            queries_of(config, settings, self.num_heads, self.head_size)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As vLLM's, and what the step says."""
        step = extra(attn_metadata)
        if step is None:
            found: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return found
        if step.heads is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        else:
            self._apart(step, step.heads, layer, query, kv_cache, attn_metadata, output)
        scale = query_scale(layer, query)
        step.remember(self._index(layer), query, attn_metadata.num_actual_tokens, scale)
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Never where something is compressed: heads of unequal lengths write numbers as they are."""
        return not self._ours and bool(super().fused_output_quant_supported(quant_key))

    def _index(self, layer: Any) -> int:
        name = layer.layer_name
        if name not in self._layers:
            self._layers[name] = layer_index(name)
        return self._layers[name]

    def _apart(
        self, step: Step, heads: HeadStep, layer: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        """Attention of every head by itself."""
        if self._pages is None or not self._pages.of_cache(cache):
            self._pages = Pages(cache, _cells(layer, output.dtype))
        heads.fill(step.numbers[self._index(layer)])
        asked = heads.split(query)
        found = heads.target(asked, output)
        self.attend(heads, self._pages, layer, asked, metadata, found)
        heads.join(found, output)

    def attend(self, heads: HeadStep, pages: Pages, layer: Any, asked: Tensor, metadata: Any, found: Tensor) -> None:
        """Attention of ``R * H`` sequences with one KV head, ``[T * H, G, D]``, written to ``found``."""
        raise NotImplementedError


class Backend(_Backend):
    """vLLM's backend; stock wherever the engine was not configured for kvthrift."""

    @classmethod
    def get_required_kv_cache_layout(cls) -> Any:
        """A block is one page after another of each head, where something is compressed."""
        config = get_current_vllm_config_or_none()
        if config is None or worker.settings_of(config) is None:
            return super().get_required_kv_cache_layout()
        return "HND"


def _give(layer: Any, config: Any, spec: Any) -> Any:
    """A layer's cache spec, with its policy where it is of a kind that is compressed.

    Raises:
        UnsupportedModelError: it is, and its kernels are not served.
    """
    settings = worker.settings_of(config)
    if settings is None or spec is None:
        return spec
    found = compressed(spec, settings, partial(layer_index, layer.layer_name))
    if found is not spec and not issubclass(layer.get_attn_backend(), Backend):
        raise UnsupportedModelError(
            f"layer {layer.layer_name} uses the attention backend {layer.get_attn_backend().get_name()}, with which "
            "kvthrift does not compress. Start with --attention-backend FLASH_ATTN or TRITON_ATTN."
        )
    return found
