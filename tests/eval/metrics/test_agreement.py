"""Agreement against naive loops, and the worked examples of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvthrift.eval.metrics.agreement import Agreement, compare, divergence, overlap


def drawn(steps: int, words: int = 23, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(steps, words, generator=generator)
    return reference, reference + 0.7 * torch.randn(steps, words, generator=generator)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 40])
def test_same_as_naive_loops(steps: int) -> None:
    reference, other = drawn(steps, seed=steps)
    tokens = reference.argmax(dim=-1).tolist()
    found = compare(reference, other, tokens)
    mismatches, kl, shared = [], [], 0.0
    for step, token in enumerate(tokens):
        a, b = reference[step].tolist(), other[step].tolist()
        if any(value > b[token] for value in b):
            mismatches.append(step)
        p, q = softmax(a), softmax(b)
        kl.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        top = [set(sorted(range(len(row)), key=lambda place, row=row: -row[place])[:5]) for row in (a, b)]
        shared += len(top[0] & top[1]) / 5
    assert list(found.mismatches) == mismatches
    assert found.kl == pytest.approx(kl, abs=1e-6)
    assert found.top5 == pytest.approx(shared / steps)
    assert found.top1 == pytest.approx(1 - len(mismatches) / steps)
    assert found.first_divergence == (mismatches[0] if mismatches else None)
    assert found.first_token == (0 not in mismatches)
    assert found.later == (len([step for step in mismatches if step]), steps - 1)


def test_a_cache_agrees_with_itself() -> None:
    reference, _ = drawn(20)
    found = compare(reference, reference, reference.argmax(dim=-1).tolist())
    assert found.mismatches == ()
    assert found.first_divergence is None
    assert max(found.kl) < 1e-6
    assert found.top5 == 1


def test_a_constant_changes_nothing() -> None:
    reference, other = drawn(20)
    tokens = reference.argmax(dim=-1).tolist()
    plain, shifted = compare(reference, other, tokens), compare(reference, other + 3.5, tokens)
    assert shifted.mismatches == plain.mismatches
    assert shifted.kl == pytest.approx(plain.kl, abs=1e-5)


def test_ties_agree() -> None:
    other = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.bfloat16)
    assert compare(other, other, [1]).mismatches == ()
    assert compare(other, other, [2]).mismatches == (0,)


def test_no_mismatch_where_the_spread_is_below_the_margin() -> None:
    reference, other = drawn(200)
    tokens = reference.argmax(dim=-1).tolist()
    wrong = set(compare(reference, other, tokens).mismatches)
    top = reference.topk(2, dim=-1).values
    margin, change = top[:, 0] - top[:, 1], other - reference
    spread = change.amax(dim=-1) - change.amin(dim=-1)
    assert wrong
    assert all(spread[step] >= margin[step] for step in wrong)


def test_what_the_reference_rules_out_adds_nothing() -> None:
    reference = torch.tensor([[0.0, float("-inf")]])
    other = torch.tensor([[0.0, 0.0]])
    assert divergence(reference, other).tolist() == pytest.approx([math.log(2)])
    assert overlap(reference, other, 5).tolist() == [1.0]


def test_plain_form_reads_back() -> None:
    reference, other = drawn(9)
    found = compare(reference, other, reference.argmax(dim=-1).tolist(), cut=True)
    again = Agreement.from_plain(found.plain())
    assert again.mismatches == found.mismatches
    assert again.cut
    assert again.kl == pytest.approx(found.kl, rel=1e-4)
