"""Bounds on pages and the choice among them: worked numbers, what must always hold, and Triton against its twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_coded import sound
from tests.kernels.test_paged import DEVICE, NAN, pages_of, row_by_row
from tests.kernels.test_sight import KINDS, asked, made
from torch import Tensor

from kvthrift.errors import OptionError, UnknownNameError
from kvthrift.kernels import (
    PageBounds,
    Paged,
    best_pages,
    naive,
    page_bounds,
    page_scores,
    paged_append,
    paged_attend,
    update_bounds,
)

LENGTHS = [5, 33, 0, 16, 100, 1, 47, 49]  # 2 sequences of 4 heads, pages of 16


def poisoned(paged: Paged) -> Paged:
    """NaN behind each row's last entry, which no bound may see."""
    for row, n in enumerate(paged.lengths.tolist()):
        if n % paged.page:
            last = row if paged.coded else paged.table[row, n // paged.page].long()
            paged.keys[last, n % paged.page :] = NAN
    return paged


def keys_of(paged: Paged, row: int, place: int) -> Tensor:
    """``[n, Dk]`` the keys of a row's page, float64."""
    n = min(int(paged.lengths[row]) - place * paged.page, paged.page)
    return paged.keys[paged.table[row, place].long(), :n].double()


def triton_scores(q: Tensor, paged: Paged, bounds: PageBounds, **how: Any) -> Tensor:
    pytest.importorskip("triton")
    from kvthrift.kernels.triton.top_pages import page_scores

    return page_scores(q, paged, bounds, **how)


def test_bounds_and_scores_by_hand() -> None:
    """Keys (1, -2), (3, 5) are within 1..3 and -2..5; q = (2, -1) comes to 6 + 2 at most, (-1, 1) to -1 + 5."""
    paged = pages_of([18], dim=2)
    page = paged.table[0].long()
    paged.keys[page[0]] = torch.tensor([1.0, -2.0], device=DEVICE)
    paged.keys[page[0], 7] = torch.tensor([3.0, 5.0], device=DEVICE)
    paged.keys[page[1], :2] = torch.tensor([[0.0, 4.0], [-1.0, 4.0]], device=DEVICE)
    bounds = page_bounds(poisoned(paged))
    assert [b[page].tolist() for b in bounds] == [[[1.0, -2.0], [-1.0, 4.0]], [[3.0, 5.0], [0.0, 4.0]]]
    q = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], device=DEVICE).view(1, 2, 1, 2)
    assert page_scores(q, paged, bounds).tolist() == [[8.0, 5.0]]
    assert page_scores(q, paged, bounds, over="sum").tolist() == [[12.0, 1.0]]
    assert page_scores(q, paged, bounds, per="query_head").tolist() == [[8.0, -4.0], [4.0, 5.0]]
    assert page_scores(q.transpose(1, 2), paged, bounds, per="query_head", over="sum").tolist() == [[12.0, 1.0]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    queries=st.integers(1, 3),
    shift=st.sampled_from((0.0, 3.0, -20.0)),
    seed=st.integers(0, 2**16),
)
def test_no_logit_is_above_its_pages_score(
    kind: str, lengths: list[int], queries: int, shift: float, seed: int
) -> None:
    torch.manual_seed(seed)
    paged, plain = made(kind, lengths, dim=24, value_dim=8)
    if kind == "plain":
        paged.keys.add_(shift)
        paged = plain = poisoned(paged)
    bounds = page_bounds(paged)
    assert all(b.isfinite().all() for b in bounds)
    q = torch.randn(1, 2 * len(lengths), queries, 24, device=DEVICE)
    scores = page_scores(q, paged, bounds, per="query_head")
    for head, row in ((h, h // 2) for h in range(2 * len(lengths))):
        held = -(-lengths[row] // 16)
        assert (scores[head, held:] == -torch.inf).all()
        for place in range(held):
            keys = keys_of(plain, row, place)
            products = q[0, head].double() @ keys.T
            assert scores[head, place] >= products.max() - 1e-4
            if len(keys) == 1:  # nothing else it could be
                torch.testing.assert_close(scores[head, place].double(), products.max(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("group", "steps", "dim"), [(1, 1, 64), (3, 1, 80), (4, 2, 128), (2, 5, 96), (8, 16, 16)])
@pytest.mark.parametrize("over", ["max", "sum"])
@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", ["plain", "int4", "fp8"])
def test_triton_scores_what_the_twin_does(kind: str, per: str, over: str, group: int, steps: int, dim: int) -> None:
    paged, _ = made(kind, [600, 33, 0, 16], dim=dim, value_dim=16)
    bounds = page_bounds(paged)
    q = torch.randn(2, 2 * group, steps, dim, device=DEVICE)
    found, wanted = (f(q, paged, bounds, per=per, over=over) for f in (triton_scores, naive.page_scores))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-5)
    products = q.reshape(4, -1, 1, 1, dim).double() * torch.stack(
        [b[paged.table.long()].double() for b in bounds], -2
    ).unsqueeze(1)  # [rows, GQ, width, 2, dim]
    by_query = products.amax(-2).sum(-1)
    folded = by_query.view(len(wanted), -1, wanted.shape[1])
    exact = folded.amax(1) if over == "max" else folded.sum(1)
    there = wanted > -torch.inf
    torch.testing.assert_close(wanted[there].double(), exact[there], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("appended", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_follow_what_is_appended(kind: str, appended: int) -> None:
    """Over two page borders; pages that other rows left unused are not touched."""
    paged, _ = made(kind, [0, 15, 16, 30, 33, 2], dim=24, value_dim=8, room=36)
    bounds = page_bounds(paged)
    for _ in range(36 // appended):
        k, v = (torch.randn(2, 3, appended, d, device=DEVICE) for d in (24, 8))
        paged_append(k, v, torch.full((2, appended), 101, device=DEVICE), paged)
        update_bounds(bounds, paged, appended)
        for mine, fresh in zip(bounds, page_bounds(paged), strict=True):
            assert torch.equal(mine, fresh)


def test_rows_that_share_pages_have_one_bound() -> None:
    paged = pages_of([40, 40], dim=8)
    shared = replace(paged, table=paged.table[:1].repeat(2, 1))
    for one, two in zip(page_bounds(replace(paged, table=paged.table[:1], lengths=paged.lengths[:1])),
                        page_bounds(shared), strict=True):  # fmt: skip
        assert torch.equal(one, two)


def chosen(scores: list[float], count: int, always: int) -> list[int]:
    """The newest pages and the best of the others, ties to the older ones, in order."""
    older = list(range(max(len(scores) - always, 0)))
    best = sorted(older, key=lambda p: (-scores[p], p))[: count - always]
    return sorted(best) + list(range(len(older), len(scores)))


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (1, 2), (1, 3), (1, 6), (4, 2), (4, 3), (1, 50)])
@pytest.mark.parametrize("over", ["max", "sum"])
@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_the_choice_is_what_sorting_would_choose(kind: str, per: Any, over: Any, steps: int, count: int) -> None:
    paged, _ = made(kind, LENGTHS, dim=16)
    q = torch.randn(2, 8, steps, 16, device=DEVICE).round()  # ties
    bounds = PageBounds(*(b.round() for b in page_bounds(paged)))
    found = best_pages(q, paged, bounds, count, per=per, over=over)
    scores = page_scores(q, paged, bounds, per=per, over=over)
    assert found.table.shape == (8 if per == "group" else 16, min(count, paged.table.shape[1]))
    for row in range(len(scores)):
        old = row if per == "group" else row // 2
        length, held = LENGTHS[old], -(-LENGTHS[old] // 16)
        wanted = chosen(scores[row, :held].tolist(), count, 1 if steps == 1 else 2)
        assert found.table[row, : len(wanted)].tolist() == paged.table[old, wanted].tolist()
        assert int(found.lengths[row]) == length - 16 * (held - len(wanted))


@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_all_pages_nothing_is_left_out(kind: str, per: Any) -> None:
    paged, _ = made(kind, LENGTHS, dim=16, bias=True)
    paged = replace(paged, keys=paged.keys.nan_to_num(), values=paged.values.nan_to_num())
    paged = sound(paged) if kind != "plain" else paged
    for steps in (1, 3):
        q = torch.randn(2, 8, steps, 16, device=DEVICE)
        sight = asked({"causal": True, "window": 60, "cap": 3.0}, steps, 2)
        found = paged_attend(q, best_pages(q, paged, page_bounds(paged), 7, per=per), scale=0.25, **sight)
        wanted = paged_attend(q, paged, scale=0.25, **sight)
        torch.testing.assert_close(found.out, wanted.out, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.lse, wanted.lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_attention_is_over_the_chosen_pages_alone(kind: str, per: Any) -> None:
    """Every other page is NaN, and would show."""
    paged, plain = made(kind, LENGTHS, dim=16)
    q = torch.randn(2, 8, 3, 16, device=DEVICE)
    narrow = best_pages(q, paged, page_bounds(paged), 2, per=per)
    used = set(narrow.table[narrow.lengths > 0].flatten().tolist())
    unused = [p for p in range(len(plain.positions)) if p not in used]
    plain.keys[unused], plain.values[unused] = NAN, NAN
    wanted, _ = row_by_row(q, replace(narrow, keys=plain.keys, values=plain.values), 0.25, causal=True)
    assert wanted.isfinite().all()
    readable = sound(narrow) if kind != "plain" else replace(
        narrow, keys=plain.keys.nan_to_num(), values=plain.values.nan_to_num()
    )  # fmt: skip
    found = paged_attend(q, readable, scale=0.25, causal=True)
    torch.testing.assert_close(found.out.double(), wanted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_honoured_is_refused() -> None:
    paged, q = pages_of([20], dim=16), torch.zeros(1, 1, 1, 16, device=DEVICE)
    bounds = page_bounds(paged)
    with pytest.raises(OptionError, match="count=0"):
        best_pages(q, paged, bounds, 0)
    with pytest.raises(OptionError, match="newest 2"):
        best_pages(q.expand(1, 1, 2, 16), paged, bounds, 1)
    with pytest.raises(UnknownNameError, match="query_head"):
        best_pages(q, paged, bounds, 1, per="head")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="sum"):
        page_scores(q, paged, bounds, over="mean")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="appended=17"):
        update_bounds(bounds, paged, 17)
