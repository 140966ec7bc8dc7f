"""How many blocks of a prompt are given back: pure arithmetic that the scheduler and every worker share.

Knows nothing of vLLM, of tensors or of which tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvthrift.errors import BudgetError


@dataclass(frozen=True)
class Policy:
    """A budget in the terms of a server: what is kept of a prompt, in whole blocks.

    Exactly one of ``entries`` and ``share`` is set.

    Attributes:
        entries: tokens per KV head.
        share: of the prompt, in (0, 1].
        least: tokens per KV head that are always kept (sinks and recent window).
    """

    entries: int | None = None
    share: float | None = None
    least: int = 0

    def __post_init__(self) -> None:
        if (self.entries is None) == (self.share is None):
            raise BudgetError("a server's budget is either entries per head or a share of the prompt.")

    def blocks(self, prompt: int, block: int) -> int:
        """Whole blocks that a prompt of so many tokens keeps of its full ones."""
        wanted = self.entries if self.entries is not None else int((self.share or 0) * prompt)
        return max(1, -(-max(wanted, self.least) // block))


@dataclass(frozen=True)
class Plan:
    """What becomes of a request's blocks.

    Attributes:
        full: full blocks of the prompt.
        dropped: leading blocks that are given back; kept tokens lie in blocks ``dropped .. full - 1``.
    """

    full: int
    dropped: int

    @property
    def kept(self) -> int:
        """Blocks that hold what is kept of the full ones."""
        return self.full - self.dropped


def plan(prompt: int, settled: int, block: int, policy: Policy) -> Plan:
    """The blocks of a request of ``prompt`` tokens of which ``settled`` are computed for good.

    Nothing is dropped before the prompt is read whole; from then on the answer does not change any more.

    Args:
        prompt: tokens of the prompt.
        settled: tokens in the cache that cannot be taken back (drafts and steps in flight do not count).
        block: tokens a block.
        policy: the budget.
    """
    full = prompt // block
    if settled < prompt:
        return Plan(full, 0)
    return Plan(full, max(0, full - policy.blocks(prompt, block)))
