"""How many blocks of a request are given back, and when: arithmetic that the scheduler and every worker share.

Knows nothing of vLLM, of tensors or of which tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvthrift.errors import BudgetError


class LayerRule(Protocol):
    """What one layer gets of a mean over all layers."""

    def entries(self, prompt: int, mean: int) -> int:
        """Tokens per KV head of a prompt of so many tokens."""


@dataclass(frozen=True)
class Policy:
    """A budget in the terms of a server: what is kept of a request, in whole blocks, and when that is seen to.

    Exactly one of ``entries`` and ``share`` is set.

    Attributes:
        entries: tokens per KV head.
        share: of the prompt, in (0, 1]; it does not grow while the request is answered.
        least: tokens per KV head that are always kept (sinks and recent window).
        at_end: whether it is seen to once the prompt is read.
        every: also after every so many decoded tokens; None for never.
        chunk: also after every step that reads a part of the prompt, which has at most so many tokens; None for never.
        layer: how much one layer gets of it; None for as much as all.
    """

    entries: int | None = None
    share: float | None = None
    least: int = 0
    at_end: bool = True
    every: int | None = None
    chunk: int | None = None
    layer: LayerRule | None = None

    def __post_init__(self) -> None:
        if (self.entries is None) == (self.share is None):
            raise BudgetError("a server's budget is either entries per head or a share of the prompt.")
        if not self.at_end and (self.every is None or self.chunk is not None):
            raise BudgetError("a server's budget is seen to at the prompt's end, or only while it is answered.")

    def mean(self, prompt: int) -> int:
        """Tokens per KV head on average over the layers."""
        return self.entries if self.entries is not None else int((self.share or 0) * prompt)

    def blocks(self, prompt: int, block: int) -> int:
        """Whole blocks that a request with a prompt of so many tokens keeps of its full ones."""
        wanted = self.mean(prompt)
        if self.layer is not None:
            wanted = self.layer.entries(prompt, wanted)
        return max(1, -(-max(wanted, self.least) // block))

    def reading(self, prompt: int, block: int) -> int:
        """The most blocks that a prompt of so many tokens takes while it is read."""
        whole = -(-prompt // block)
        return whole if self.chunk is None else min(whole, self.blocks(prompt, block) + -(-self.chunk // block) + 1)

    def most(self, length: int, block: int) -> int:
        """The most blocks that any request of at most ``length`` tokens, prompt and answer, ever takes."""
        whole = -(-length // block)
        if self.chunk is None or self.every is None:
            return whole  # an answer, or a prompt, grows without bounds
        kept = max(self.blocks(length, block), -(-self.mean(length) // block))  # short prompts may have equal layers
        return min(whole, kept + -(-(self.every + self.chunk) // block) + 2)


@dataclass(frozen=True)
class Plan:
    """What became of a request's blocks.

    Attributes:
        at: tokens there were when it was last seen to; 0 if it was not yet.
        full: full blocks there were then.
        dropped: leading blocks that are given back; kept tokens lie in blocks ``dropped .. full - 1``.
    """

    at: int
    full: int
    dropped: int

    @property
    def kept(self) -> int:
        """Blocks that hold what is kept of the full ones."""
        return self.full - self.dropped


def plan(prompt: int, settled: int, block: int, policy: Policy) -> Plan:
    """The blocks of a request of which ``settled`` tokens are computed for good.

    What is dropped never becomes less as more is settled.

    Args:
        prompt: tokens of the prompt.
        settled: tokens in the cache that cannot be taken back (drafts and steps in flight do not count).
        block: tokens a block.
        policy: the budget.
    """
    at = _last(prompt, settled, policy)
    full = at // block
    return Plan(at, full, max(0, full - policy.blocks(prompt, block)) if at else 0)


def _last(prompt: int, settled: int, policy: Policy) -> int:
    """Tokens there were when the request was last seen to; 0 if it was not yet."""
    if settled < prompt:
        return settled if policy.chunk is not None else 0
    turns = 0 if policy.every is None else (settled - prompt) // policy.every
    return prompt + turns * (policy.every or 0) if turns or policy.at_end else 0


def untouched(prompt: int, block: int, policy: Policy) -> int | None:
    """Leading blocks of a request that are never written over, and so can be shared; None if that is all of them.

    They are those that the first compression drops. Where steps may end anywhere in a prompt it is not known which
    compression comes first, and none is safe.

    Args:
        prompt: tokens of the prompt.
        block: tokens a block.
        policy: the budget.
    """
    kept = policy.blocks(prompt, block)
    full = prompt // block
    if full > kept and policy.chunk is not None:
        return 0
    if full > kept and policy.at_end:
        return full - kept
    if policy.every is None:
        return None
    turns = max(-(-((kept + 1) * block - prompt) // policy.every), 0 if policy.at_end else 1)
    return (prompt + turns * policy.every) // block - kept
