"""The arithmetic that scheduler and workers share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvthrift.errors import BudgetError
from kvthrift.integrations.vllm.plan import Policy, plan

policies = st.one_of(
    st.builds(Policy, entries=st.integers(1, 5000), least=st.integers(0, 200)),
    st.builds(Policy, share=st.floats(0.001, 1.0), least=st.integers(0, 200)),
)
blocks = st.sampled_from([16, 32, 64, 128])


def test_a_worked_example() -> None:
    # 1,503 tokens in blocks of 32: 46 full ones; 512 entries are 16 blocks, so 30 are given back
    found = plan(1503, 1503, 32, Policy(entries=512))
    assert (found.full, found.dropped, found.kept) == (46, 30, 16)


@given(st.integers(0, 100_000), blocks, policies)
def test_what_is_kept_holds_the_budget_and_what_is_protected(prompt: int, block: int, policy: Policy) -> None:
    found = plan(prompt, prompt, block, policy)
    assert 0 <= found.dropped <= found.full == prompt // block
    if found.dropped:
        wanted = policy.entries if policy.entries is not None else int((policy.share or 0) * prompt)
        assert max(wanted, policy.least, 1) <= found.kept * block < max(wanted, policy.least, 1) + block


@given(st.integers(1, 10_000), st.integers(0, 3_000), blocks, policies)
def test_it_depends_on_settled_tokens_only_through_the_prompts_end(
    prompt: int, more: int, block: int, policy: Policy
) -> None:
    assert plan(prompt, prompt - 1, block, policy).dropped == 0
    assert plan(prompt, prompt + more, block, policy) == plan(prompt, prompt, block, policy)


@given(st.integers(0, 10_000), blocks, st.integers(1, 2_000), st.integers(0, 2_000))
def test_a_larger_budget_never_drops_more(prompt: int, block: int, entries: int, more: int) -> None:
    small, large = (plan(prompt, prompt, block, Policy(entries=n)).dropped for n in (entries, entries + more))
    assert large <= small


def test_a_policy_is_entries_or_a_share() -> None:
    for given_both in ({}, {"entries": 4, "share": 0.5}):
        with pytest.raises(BudgetError):
            Policy(**given_both)  # type: ignore[arg-type]
