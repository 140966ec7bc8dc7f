"""What queries see: their own entries, a window of true positions, capped logits; and every head dim, group and page.

The naive twin against float64, Triton's kernels against it too, dense and in few bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels import test_coded, test_paged
from tests.kernels.test_coded import FORMS, coded_pages, sound
from tests.kernels.test_paged import DEVICE, pages_of, row_by_row
from torch import Tensor

from kvthrift.errors import OptionError
from kvthrift.kernels import Paged, naive, paged_attend

LENGTHS = [5, 33, 0, 16, 64, 1, 47, 2]  # 2 sequences of 4 heads
SIGHTS = [
    {"causal": True},
    {"window": 9},
    {"cap": 2.0},
    {"causal": True, "window": 20, "cap": 0.5},
]
KINDS = ["plain", *sorted(FORMS)]


def made(kind: str, lengths: list[int] = LENGTHS, **kwargs: Any) -> tuple[Paged, Paged]:
    """Rows whose true positions have gaps, and the same as they read; the newest entries are the newest tokens."""
    paged, plain = (
        (pages_of(lengths, **kwargs),) * 2 if kind == "plain" else coded_pages(FORMS[kind], lengths, **kwargs)
    )
    positions = paged.positions
    for row, n in enumerate(lengths):
        steps = torch.randint(1, 3, (n,), device=DEVICE)
        found = steps.cumsum(0) + 100 - int(steps.sum())  # up to 100
        index = torch.arange(n, device=DEVICE)
        positions[paged.table[row, index // paged.page].long(), index % paged.page] = found.int()
    return replace(paged, positions=positions), replace(plain, positions=positions)


def asked(sight: dict[str, Any], queries: int, batch: int) -> dict[str, Any]:
    """With the queries' positions, where a window needs them; the last is that of the newest entry."""
    if "window" not in sight:
        return sight
    last = torch.tensor([100, 95], device=DEVICE)[:batch, None]
    return {**sight, "positions": last - torch.arange(queries - 1, -1, -1, device=DEVICE)}


def triton(kind: str, q: Tensor, paged: Paged, *args: Any, **sight: Any) -> tuple[Tensor, Tensor]:
    return (test_paged if kind == "plain" else test_coded).triton_read(q, paged, *args, **sight)


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_naive_twin_sees_what_float64_does(kind: str, sight: dict[str, Any], queries: int) -> None:
    paged, plain = made(kind, dim=24, value_dim=8, bias=True)
    if kind == "plain":
        paged = replace(paged, keys=paged.keys.nan_to_num(), values=paged.values.nan_to_num())
    else:
        paged = sound(paged)
    q = torch.randn(2, 8, queries, 24, device=DEVICE)
    sight = asked(sight, queries, 2)
    out, lse = row_by_row(q, plain, 0.5, **sight)
    found = naive.paged_attend(q, paged, scale=0.5, **sight)
    torch.testing.assert_close(found.out.double(), out, atol=1e-5, rtol=1e-5)
    assert found.lse is not None
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("queries", "bias", "programs"), [(1, False, 3), (3, True, 7), (16, False, 1)])
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_sees_what_float64_does(
    kind: str, sight: dict[str, Any], queries: int, bias: bool, programs: int
) -> None:
    paged, plain = made(kind, dim=32, bias=bias)
    q = torch.randn(2, 8, queries, 32, device=DEVICE)
    sight = asked(sight, queries, 2)
    out, lse = row_by_row(q, plain, 0.5, **sight)
    found, found_lse = triton(kind, q, paged, 0.5, programs, **sight)
    torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_more_queries_than_one_program_holds_are_read_in_turns(kind: str) -> None:
    paged, plain = made(kind, [30, 7, 50], dim=64, value_dim=32)
    q = torch.randn(1, 48, 15, 64, device=DEVICE)  # 240 a row
    sight = asked({"causal": True, "window": 20}, 15, 1)
    out, lse = row_by_row(q, plain, 0.125, **sight)
    found, found_lse = triton(kind, q, paged, 0.125, 4, **sight)
    torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_rows_of_one_length_see_alike(kind: str) -> None:
    paged, plain = made(kind, [50] * 4, dim=16)
    q = torch.randn(2, 4, 4, 16, device=DEVICE)
    sight = asked({"causal": True, "window": 30, "cap": 1.0}, 4, 2)
    out, lse = row_by_row(q, plain, 0.25, **sight)
    for programs in (4, 5, 8):
        found, found_lse = triton(kind, q, paged, 0.25, programs, True, **sight)
        torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
        torch.testing.assert_close(found_lse.double(), lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_a_query_that_sees_nothing_gets_nothing(kind: str) -> None:
    """Two entries for three queries: the first sees none; then a window that every entry has left."""
    paged, _ = made(kind, [2], dim=16)
    q = torch.randn(1, 1, 3, 16, device=DEVICE)
    found, lse = triton(kind, q, paged, 0.25, causal=True)
    assert (found[0, 0, 0] == 0).all()
    assert lse[0, 0].isinf().tolist() == [True, False, False]
    far = torch.full((1, 3), 1000, device=DEVICE)
    found, lse = triton(kind, q, paged, 0.25, window=10, positions=far)
    assert (found == 0).all()
    assert (lse == -torch.inf).all()


def test_a_window_by_hand() -> None:
    """As in transformers: position p is within a window of w of query position q where p > q - w."""
    paged = pages_of([4], dim=16)
    paged.positions[paged.table[0, 0].long(), :4] = torch.tensor([3, 5, 6, 9], dtype=torch.int32, device=DEVICE)
    paged.keys.zero_()
    paged.values.zero_()
    paged.values[paged.table[0, 0].long(), range(4), range(4)] = 1.0
    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    at = torch.tensor([[8, 9]], device=DEVICE)
    for find in (naive.paged_attend, paged_attend):
        found = find(q, paged, scale=1.0, causal=True, window=4, positions=at)
        assert found.out[0, 0, :, :4].tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]]
    out, _ = triton("plain", q, paged, 1.0, causal=True, window=4, positions=at)
    torch.testing.assert_close(out, found.out)


@pytest.mark.parametrize("logit", [1e-6, 0.1, 3.0, 60.0, 1e5, -1e5])
def test_capped_logits_are_never_lost(logit: float) -> None:
    paged = pages_of([1], dim=16)
    paged.keys.zero_()
    paged.keys[paged.table[0, 0].long(), 0, 0] = 1.0
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    q[..., 0] = logit
    _, lse = triton("plain", q, paged, 1.0, cap=50.0)
    wanted = 50.0 * torch.tanh(torch.tensor(logit / 50.0, dtype=torch.float64))
    torch.testing.assert_close(lse.double().cpu()[0, 0, 0], wanted, atol=1e-5, rtol=1e-6)


def test_what_cannot_be_honoured_is_refused() -> None:
    paged, q = pages_of([4, 4], dim=16), torch.zeros(2, 1, 3, 16, device=DEVICE)
    for sight, word in (
        ({"cap": 0.0}, "cap=0.0"),
        ({"cap": float("nan")}, "cap=nan"),
        ({"window": 0, "positions": torch.zeros(2, 3)}, "window=0"),
        ({"window": 8}, "no positions"),
        ({"window": 8, "positions": torch.zeros(1, 3)}, r"shape \(1, 3\)"),
    ):
        with pytest.raises(OptionError, match=word):
            paged_attend(q, paged, scale=1.0, **sight)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_reads_every_shape(kind: str, dim: int, group: int) -> None:
    page = (16, 32, 64)[(group + dim // 16) % 3]
    paged, plain = made(kind, [page + 3, 0, 1, 2 * page], dim=dim, page=page)
    q = torch.randn(2, 2 * group, 1, dim, device=DEVICE)
    out, lse = row_by_row(q, plain, dim**-0.5)
    found, found_lse = triton(kind, q, paged, dim**-0.5, 3)
    torch.testing.assert_close(found.double(), out, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=5e-5, rtol=5e-5)
