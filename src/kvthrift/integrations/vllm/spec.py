"""The scheduler's side: a cache spec that carries the policy, and the manager that gives blocks back.

Built on vLLM's registry of cache specs and on subclassing; imported only inside vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvthrift.integrations.vllm.plan import Policy, plan


class CompressedManager(FullAttentionManager):
    """Gives back the leading blocks of a prompt once it is read, as a sliding window's manager does."""

    def _dropped(self, prompt: int, settled: int) -> int:
        return plan(prompt, settled, self.block_size, self.kv_cache_spec.policy).dropped

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Called with settled tokens only, before blocks are allocated."""
        if num_prompt_tokens is None:
            return
        dropped = self._dropped(num_prompt_tokens, processed_computed_tokens)
        if dropped:
            self._remove_blocks_in_range(request_id, 0, dropped)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish only blocks that are never written over; what they hold is the whole prompt's beginning."""
        dropped = self._dropped(request.num_prompt_tokens, request.num_prompt_tokens)
        if dropped:
            num_tokens = min(num_tokens, dropped * self.block_size)
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
        """Never share blocks that this request will write over; its prompt has ``max_length + 1`` tokens."""
        prompt, block = max_length + 1, kv_cache_spec.block_size
        dropped = plan(prompt, prompt, block, kv_cache_spec.policy).dropped
        return super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=min(max_length, dropped * block) if dropped else max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            **kwargs,
        )


KVCacheSpecRegistry._ensure_registered()  # a registry that is not empty never learns the built-in specs


@register_kv_cache_spec(manager_class=CompressedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """Full attention whose prompts are compressed under ``policy``."""

    policy: Policy

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        """Specs of one group, which must be the same: vLLM takes the AssertionError for "they are not"."""
        assert all(spec == specs[0] for spec in specs), "layers with different policies are different groups"
        return specs[0]


def compressed(spec: Any, policy: Policy) -> Any:
    """A layer's spec with the policy; other kinds of layers (windows, latents, states) stay as they are."""
    if type(spec) is not FullAttentionSpec:
        return spec
    given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
    return CompressedSpec(**given, policy=policy)
