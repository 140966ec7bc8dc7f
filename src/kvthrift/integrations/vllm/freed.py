"""What a request gave back while it ran, by its lengths. Knows no vLLM class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvthrift.integrations.vllm.plan import Policy, plan


@dataclass(frozen=True)
class Freed:
    """Blocks, one for each class of layers, and their bytes over all layers."""

    blocks: int
    bytes: int


def freed_by(policies: Sequence[Policy], prompt: int, generated: int, *, block: int, block_bytes: int) -> Freed:
    """What a request gave back before it ended.

    The scheduler takes blocks back when it makes room for the next token: what the last step made superfluous goes with
    the request, and of a request with one generated token nothing is counted.

    Args:
        policies: of every layer.
        prompt, generated: tokens.
        block: tokens a block.
        block_bytes: bytes of one block of one layer.
    """
    if generated < 2:
        return Freed(0, 0)
    members = Counter(policies)
    dropped = {policy: plan(prompt, prompt + generated - 2, block, policy).dropped for policy in members}
    return Freed(sum(dropped.values()), block_bytes * sum(dropped[policy] * count for policy, count in members.items()))
