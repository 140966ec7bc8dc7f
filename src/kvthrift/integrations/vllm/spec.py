"""The scheduler's side: a cache spec that carries the policy, and the manager that gives blocks back.

Built on vLLM's registry of cache specs and on subclassing; imported only inside vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakSet

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.layers import MOST
from kvthrift.integrations.vllm.plan import Policy, plan, untouched
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.integrations.vllm.worker import say_once, settings_of

_managers: WeakSet[CompressedManager] = WeakSet()  # of this process, for checks


class CompressedManager(FullAttentionManager):
    """Gives back the leading blocks of a request once what they held is kept elsewhere, as a sliding window's does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _managers.add(self)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """As vLLM's; a prompt that is compressed while it is read is let in with room for what it takes at most."""
        found = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )
        policy: Policy = self.kv_cache_spec.policy
        if not apply_admission_cap or policy.chunk is None:
            return found
        return min(found, policy.reading(num_tokens, self.block_size))

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Called with settled tokens only, before blocks are allocated."""
        if num_prompt_tokens is None:
            return
        found = plan(num_prompt_tokens, processed_computed_tokens, self.block_size, self.kv_cache_spec.policy)
        if found.dropped:
            self._remove_blocks_in_range(request_id, 0, found.dropped)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish only blocks that are never written over; what they hold is the request's beginning."""
        safe = untouched(request.num_prompt_tokens, self.block_size, self.kv_cache_spec.policy)
        if safe is not None:
            num_tokens = min(num_tokens, safe * self.block_size)
            request.skip_reading_prefix_cache = True  # if it is preempted it is computed anew
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Any,
        block_pool: Any,
        kv_cache_spec: Any,
        **kwargs: Any,
    ) -> Any:
        """Never share blocks that this request will write over.

        Its prompt's length is known to the block only: with several groups ``max_length`` is what the others found.
        """
        block, step = kv_cache_spec.block_size, block_pool.hash_block_size
        least = len(block_hashes) * step
        safe = [untouched(prompt, block, kv_cache_spec.policy) for prompt in range(max(least, 1), least + step)]
        caps = [count * block for count in safe if count is not None]
        return super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=min([max_length, *caps]),
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            **kwargs,
        )


def freed(policy: Policy, request: str) -> int | None:
    """Leading blocks that the scheduler took back of a request; None if it lives in another process."""
    for manager in _managers:
        blocks = manager.req_to_blocks.get(request)
        if blocks and manager.kv_cache_spec.policy == policy:
            return next((count for count, block in enumerate(blocks) if not block.is_null), len(blocks))
    return None


KVCacheSpecRegistry._ensure_registered()  # a registry that is not empty never learns the built-in specs


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """Full attention whose requests are compressed under ``policy``."""

    policy: Policy

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        """Specs of one group, which must be the same: vLLM takes the AssertionError for "they are not"."""
        assert all(spec == specs[0] for spec in specs), "layers with different policies are different groups"
        return specs[0]

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request."""
        length = vllm_config.model_config.max_model_len
        return self.policy.most(length, self.block_size) * self.page_size_bytes


def _kind(number: int) -> type[CompressedSpec]:
    """A class of its own for each class of layers: vLLM puts those of one kind into one group."""
    name = f"CompressedSpec{number}"
    found: type[CompressedSpec] = dataclass(frozen=True, kw_only=True)(
        type(name, (CompressedSpec,), {"__module__": __name__})
    )
    register_kv_cache_spec(manager_class=CompressedManager, uniform_type_base_spec=found)(found)
    globals()[name] = found  # where pickle looks for it
    return found


KINDS = tuple(_kind(number) for number in range(MOST))


def check_compressed(config: Any, specs: dict[str, Any], groups: Any, taken: Callable[[], dict[str, str]]) -> None:
    """Refuse an engine that was asked to compress and does not, so that nothing runs uncompressed unsaid.

    Args:
        config: of the engine.
        specs: of its layers.
        groups: that vLLM makes of them.
        taken: tells attention backends that another plugin has replaced.

    Raises:
        UnsupportedModelError: its attention backend is another, or its layers are of other kinds.
    """
    settings = settings_of(config)
    if settings is None:
        return
    ours = {name for name, spec in specs.items() if isinstance(spec, CompressedSpec)}
    if not ours:
        others = "".join(f" {name} is {path}, another plugin's." for name, path in taken().items())
        raise UnsupportedModelError(
            "none of this engine's layers is compressed by kvthrift: they have no full attention, or another attention "
            f"backend than CPU_ATTN, FLASH_ATTN and TRITON_ATTN.{others} On a GPU start with --attention-backend "
            "FLASH_ATTN, beside other plugins with VLLM_PLUGINS=kvthrift, or leave kvthrift out of --additional-config."
        )
    mine = [group for group in groups if ours & set(group.layer_names)]
    if not all(isinstance(group.kv_cache_spec, CompressedSpec) for group in mine):
        raise UnsupportedModelError(
            "vLLM keeps layers that kvthrift compresses in one group with layers that it does not, so that nothing "
            "would be given back. Leave --disable-hybrid-kv-cache-manager out, or kvthrift out of --additional-config."
        )
    left = Counter(type(spec).__name__.removesuffix("Spec") for name, spec in specs.items() if name not in ours)
    block, length = mine[0].kv_cache_spec.block_size, config.model_config.max_model_len
    say_once(settings, block, length=length, layers=len(ours), left=left)


def compressed(spec: Any, settings: Settings, layer: Callable[[], int]) -> Any:
    """A layer's spec with its policy; other kinds of layers (windows, latents, states) stay as they are.

    Args:
        spec: what vLLM made of the layer.
        settings: of the server.
        layer: tells its index.
    """
    if type(spec) is not FullAttentionSpec:
        return spec
    if spec.sliding_window is not None or spec.attention_chunk_size is not None or spec.non_causal:
        return spec
    policy = settings.policies[layer()]
    given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
    return KINDS[settings.classes.index(policy)](**given, policy=policy)
