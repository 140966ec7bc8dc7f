"""What a request gave back, from its lengths."""

from __future__ import annotations

from dataclasses import replace

from kvthrift.integrations.vllm.freed import Freed, freed_by
from kvthrift.integrations.vllm.plan import Policy

ONCE = Policy(entries=512)


def test_a_worked_example() -> None:
    # 30 of 46 full blocks of 32 tokens, in 2 layers of 1,000 bytes a block
    assert freed_by([ONCE] * 2, 1503, 10, block=32, block_bytes=1000) == Freed(30, 60_000)
    assert freed_by([ONCE] * 2, 1503, 1, block=32, block_bytes=1000) == Freed(0, 0)
    assert freed_by([ONCE] * 2, 400, 10, block=32, block_bytes=1000) == Freed(0, 0)


def test_of_the_answer_what_was_settled_before_its_last_step() -> None:
    often = replace(ONCE, every=17)  # 1,520 tokens are 47 full blocks
    assert freed_by([often], 1503, 17 + 2, block=32, block_bytes=1).blocks == 31
    assert freed_by([often], 1503, 17 + 1, block=32, block_bytes=1).blocks == 30


def test_classes_of_layers_count_each() -> None:
    small = replace(ONCE, entries=256)
    assert freed_by([ONCE, ONCE, small], 1503, 10, block=32, block_bytes=10) == Freed(30 + 38, 10 * (30 + 30 + 38))
