"""The arithmetic that scheduler and workers share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift.errors import BudgetError
from kvthrift.integrations.vllm.plan import Policy, plan, untouched

once = st.one_of(
    st.builds(Policy, entries=st.integers(1, 5000), least=st.integers(0, 200)),
    st.builds(Policy, share=st.floats(0.001, 1.0), least=st.integers(0, 200)),
)
everys, chunks = st.none() | st.integers(1, 500), st.none() | st.integers(1, 4096)
often = st.builds(lambda policy, every, chunk: replace(policy, every=every, chunk=chunk), once, everys, chunks)
late = st.builds(lambda policy, every: replace(policy, at_end=False, every=every), once, st.integers(1, 500))
policies = often | late
blocks = st.sampled_from([16, 32, 64, 128])
steps = st.lists(st.integers(1, 700), min_size=1, max_size=40)


def wanted(policy: Policy, prompt: int) -> int:
    return max(policy.mean(prompt), policy.least, 1)


def test_worked_examples() -> None:
    # 1,503 tokens in blocks of 32: 46 full ones; 512 entries are 16 blocks, so 30 are given back
    found = plan(1503, 1503, 32, Policy(entries=512))
    assert (found.at, found.full, found.dropped, found.kept) == (1503, 46, 30, 16)
    # every 64 tokens of the answer: after 70 of them, what 1,567 tokens fill is 48 blocks
    found = plan(1503, 1573, 32, Policy(entries=512, every=64))
    assert (found.at, found.full, found.dropped) == (1567, 48, 32)
    # while it is read: after 700 tokens, 21 full blocks
    found = plan(1503, 700, 32, Policy(entries=512, chunk=256))
    assert (found.at, found.full, found.dropped) == (700, 21, 5)


@given(st.integers(1, 100_000), blocks, once)
def test_what_is_kept_holds_the_budget_and_what_is_protected(prompt: int, block: int, policy: Policy) -> None:
    found = plan(prompt, prompt, block, policy)
    assert 0 <= found.dropped <= found.full == prompt // block
    if found.dropped:
        assert wanted(policy, prompt) <= found.kept * block < wanted(policy, prompt) + block


@given(st.integers(1, 10_000), st.integers(0, 3_000), blocks, once)
def test_asked_for_once_it_depends_on_settled_tokens_only_through_the_prompts_end(
    prompt: int, more: int, block: int, policy: Policy
) -> None:
    assert plan(prompt, prompt - 1, block, policy).dropped == 0
    assert plan(prompt, prompt + more, block, policy) == plan(prompt, prompt, block, policy)


@given(st.integers(1, 6_000), steps, blocks, policies)
def test_nothing_comes_back_that_was_given_back_and_what_is_kept_is_there(
    prompt: int, news: list[int], block: int, policy: Policy
) -> None:
    """Whatever the steps: drops only grow, and there is always something to keep them from."""
    settled, before = 0, plan(prompt, 0, block, policy)
    assert before.dropped == 0
    for new in news:
        settled += new
        after = plan(prompt, settled, block, policy)
        assert after.dropped >= before.dropped
        assert after.at <= settled
        assert after.full == after.at // block
        if after.dropped > before.dropped:
            assert after.at > before.at  # there is something new to see to
            assert after.full > before.full
            assert after.kept == policy.blocks(prompt, block)
            assert before.dropped < after.full
        before = after


@given(st.integers(1, 6_000), steps, blocks, often)
def test_no_request_takes_more_than_was_said(prompt: int, news: list[int], block: int, policy: Policy) -> None:
    """Blocks are freed before a step's own are taken, and a step reads at most a chunk."""
    chunk = policy.chunk or max(news)
    settled = highest = reading = 0
    for new in news:
        dropped = plan(prompt, settled, block, policy).dropped
        settled += min(new, chunk) if settled < prompt else 1
        taken = -(-settled // block) - dropped
        highest, reading = max(highest, taken), max(reading, taken if settled <= prompt else 0)
    assert reading <= policy.reading(prompt, block)
    assert highest <= policy.most(max(settled, prompt), block)


@given(st.integers(1, 6_000), steps, blocks, policies)
def test_what_is_shared_is_never_written_over(prompt: int, news: list[int], block: int, policy: Policy) -> None:
    """Every compression writes to blocks from its ``dropped`` on; a hit as long as is allowed has seen none of them."""
    safe = untouched(prompt, block, policy)
    settled = 0
    for new in news:
        before, settled = plan(prompt, settled, block, policy), settled + new
        after = plan(prompt, settled, block, policy)
        if after.dropped > before.dropped:
            assert safe is not None
            assert after.dropped >= safe
    if safe is not None:
        assert plan(prompt, min(safe * block, prompt - 1), block, policy).dropped == 0


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 300), st.integers(1, 200))
def test_what_is_shared_is_no_less_than_is_safe(prompt: int, entries: int, every: int) -> None:
    """Where the first compression is known, what it drops is shared whole."""
    once = Policy(entries=entries)
    for asked in (once, replace(once, every=every), replace(once, every=every, at_end=False)):
        dropped = (plan(prompt, settled, 16, asked).dropped for settled in range(prompt, prompt + 340 + 2 * every))
        first = next((count for count in dropped if count), None)
        assert untouched(prompt, 16, asked) == first


@given(st.integers(1, 10_000), blocks, st.integers(1, 2_000), st.integers(0, 2_000))
def test_a_larger_budget_never_drops_more(prompt: int, block: int, entries: int, more: int) -> None:
    small, large = (plan(prompt, prompt, block, Policy(entries=n)).dropped for n in (entries, entries + more))
    assert large <= small


def test_a_policy_is_entries_or_a_share_at_some_time() -> None:
    for wrong in ({}, {"entries": 4, "share": 0.5}, {"entries": 4, "at_end": False}):
        with pytest.raises(BudgetError):
            Policy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        Policy(entries=4, at_end=False, every=3, chunk=64)
