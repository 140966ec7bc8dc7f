"""What queries see of pages, and which pages they read, on CUDA: Triton's kernels against the naive twins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.test_coded import sound
from tests.kernels.test_sight import KINDS, SIGHTS, asked, made
from torch import Tensor

from kvthrift.kernels import Paged, best_pages, naive, page_bounds, page_scores, paged_append, paged_attend, plan_read
from kvthrift.kernels import update_bounds as follow

pytestmark = pytest.mark.gpu

LENGTHS = [700, 63, 64, 5, 1, 0, 129, 300]  # 2 sequences of 4 heads, pages of 64


def readable(paged: Paged) -> Paged:
    if paged.coded is not None:
        return sound(paged)
    return replace(paged, keys=paged.keys.nan_to_num(), values=paged.values.nan_to_num())


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    assert found.out.dtype == dtype
    assert float((found.out - wanted.out).norm() / wanted.out.norm()) < (1e-2 if dtype == torch.bfloat16 else 5e-3)
    there = wanted.lse > -torch.inf
    assert torch.equal(there, found.lse > -torch.inf)
    torch.testing.assert_close(found.lse[there], wanted.lse[there], atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize(("group", "queries", "dim"), [(4, 1, 128), (3, 4, 80), (8, 16, 128), (7, 5, 64), (4, 16, 256)])
@pytest.mark.parametrize("sight", [{}, *SIGHTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_see_what_those_of_the_twin_see(
    kind: str, dtype: torch.dtype, sight: dict[str, Any], group: int, queries: int, dim: int
) -> None:
    """From one query a row to 128; more than a program holds are read in turns."""
    paged = readable(made(kind, LENGTHS, dim=dim, page=64, dtype=dtype, bias=group == 3)[0])
    q = torch.randn(2, 4 * group, queries, dim, device="cuda").to(dtype)
    sight = asked(sight, queries, 2)
    found = paged_attend(q, paged, scale=dim**-0.5, **sight)
    close(found, naive.paged_attend(q.float(), paged, scale=dim**-0.5, **sight), dtype)


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_rows_of_one_length_see_alike(kind: str) -> None:
    paged = readable(made(kind, [500] * 8, dim=128, page=64, dtype=torch.bfloat16)[0])
    q = torch.randn(2, 16, 4, 128, device="cuda").bfloat16()
    sight = asked({"causal": True, "window": 90, "cap": 2.0}, 4, 2)
    wanted = naive.paged_attend(q.float(), paged, scale=0.1, **sight)
    for programs in (0, 8, 24, 25):
        plan = plan_read(8, 64, 16, 128, q.device, even=True, programs=programs)
        close(paged_attend(q, paged, scale=0.1, plan=plan, **sight), wanted, torch.bfloat16)


@pytest.mark.parametrize(("group", "steps", "dim"), [(1, 1, 64), (3, 1, 80), (4, 4, 128), (8, 16, 256)])
@pytest.mark.parametrize("over", ["max", "sum"])
@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_pages_score_as_the_twin_scores_them(kind: str, per: Any, over: Any, group: int, steps: int, dim: int) -> None:
    paged = made(kind, [6000, 63, 0, 700], dim=dim, page=64, dtype=torch.bfloat16)[0]
    bounds = page_bounds(paged)
    q = torch.randn(2, 2 * group, steps, dim, device="cuda").bfloat16()
    found = page_scores(q, paged, bounds, per=per, over=over)
    torch.testing.assert_close(found, naive.page_scores(q, paged, bounds, per=per, over=over), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("per", ["group", "query_head"])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_steps_over_the_best_pages_can_be_recorded(kind: str, per: Any) -> None:
    """Append, follow the bounds, choose, read: as a CUDA graph, against the same on the naive path."""
    paged = readable(made(kind, [600, 63, 130, 700], dim=64, page=64, dtype=torch.bfloat16, room=80)[0])
    bounds = page_bounds(paged)
    q, k, v = (torch.randn(2, heads, 1, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
    at = torch.full((2,), 200, device="cuda")
    rows = 4 if per == "group" else 16
    plan = plan_read(rows, 3 * rows, q.shape[1] * 2 // rows, 64, q.device)

    def step() -> Tensor:
        paged_append(k, v, at, paged)
        follow(bounds, paged)
        return paged_attend(q, best_pages(q, paged, bounds, 3, per=per), scale=0.125, plan=plan).out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(70):  # past a page's end
        graph.replay()
    for mine, fresh in zip(bounds, page_bounds(paged), strict=True):
        torch.testing.assert_close(mine, fresh)
    narrow = best_pages(q, paged, bounds, 3, per=per)
    wanted = naive.paged_attend(q.float(), narrow, scale=0.125).out
    assert float((out - wanted).norm() / wanted.norm()) < 1e-2
