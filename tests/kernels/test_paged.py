"""Reading and appending in pages: the naive twins against attention over plain tensors, Triton against the twins.

Without a GPU, Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvthrift.errors import OptionError
from kvthrift.kernels import Paged, naive, paged_append, paged_attend, plan_read, unfit
from kvthrift.kernels.plan import cut_read

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


def pages_of(
    lengths: list[int],
    *,
    dim: int = 16,
    value_dim: int | None = None,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    room: int = 0,
) -> Paged:
    """Scattered pages for rows of such lengths; pages that belong to no row are NaN."""
    width = max(-(-(max(lengths) + room) // page), 1)
    rows = len(lengths)
    table = torch.randperm(rows * width + 3)[: rows * width].view(rows, width)
    owned = torch.zeros(rows * width + 3, dtype=torch.bool)
    for row, length in enumerate(lengths):
        owned[table[row, : -(-(length + room) // page)]] = True

    def plane(*shape: int) -> Tensor:
        full = torch.randn(rows * width + 3, page, *shape)
        return torch.where(owned.view(-1, *[1] * (full.ndim - 1)), full, torch.full_like(full, NAN))

    return Paged(
        keys=plane(dim).to(DEVICE, dtype),
        values=plane(value_dim or dim).to(DEVICE, dtype),
        positions=torch.zeros(rows * width + 3, page, dtype=torch.int32, device=DEVICE),
        table=table.to(DEVICE, torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        bias=plane().to(DEVICE) if bias else None,
    )


def row_by_row(
    q: Tensor,
    paged: Paged,
    scale: float,
    *,
    causal: bool = False,
    window: int | None = None,
    positions: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row by itself, over exactly its entries, in float64."""
    b, heads, length, dim = q.shape
    rows, page = paged.table.shape[0], paged.page
    queries = q.reshape(rows, -1, dim).double()
    outs, lses = [], []
    for row in range(rows):
        places = [(int(paged.table[row, i // page]), i % page) for i in range(int(paged.lengths[row]))]
        if not places:
            outs.append(torch.zeros(queries.shape[1], paged.values.shape[-1], dtype=torch.float64, device=q.device))
            lses.append(torch.full((queries.shape[1],), -torch.inf, dtype=torch.float64, device=q.device))
            continue
        pages, within = (torch.tensor(x, device=q.device) for x in zip(*places, strict=True))
        logits = queries[row] @ paged.keys[pages, within].double().T * scale  # [GQ, T]
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if paged.bias is not None:
            logits = logits + paged.bias[pages, within].double()
        for m, step in zip(range(len(logits)), itertools.cycle(range(length)), strict=False):
            if causal:
                logits[m, max(len(places) - length + step + 1, 0) :] = -torch.inf
            if window is not None and positions is not None:
                at = int(positions[row * b // rows, step])
                logits[m, paged.positions[pages, within] <= at - window] = -torch.inf
        outs.append(logits.softmax(-1).nan_to_num() @ paged.values[pages, within].double())
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs).view(b, heads, length, -1), torch.stack(lses).view(b, heads, length)


WAYS: list[dict[str, Any]] = [
    {},
    {"aligned": False},
    {"helpers": 0},
    {"aligned": False, "helpers": 0},
]


def triton_read(
    q: Tensor,
    paged: Paged,
    scale: float,
    programs: int = 0,
    even: bool = False,
    way: dict[str, Any] = WAYS[0],
    **sight: Any,
) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton")
    from kvthrift.kernels.triton.read import read

    rows, width = paged.table.shape
    queries = q.numel() // q.shape[-1] // rows
    plan = plan_read(rows, rows * width, queries, paged.values.shape[-1], q.device, programs=programs, even=even, **way)
    first = read(q, paged, scale, plan, **sight)
    again = read(q, paged, scale, plan, **sight)  # the scratch is fit to be used again
    assert not plan.arrived.any()
    assert not (plan.turns & 0x7FFFFFFF).any()
    torch.testing.assert_close(first, again, equal_nan=True)
    return first


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("lengths", "heads", "queries"), [([5, 33, 1, 16], 2, 1), ([0, 48], 2, 3), ([70], 1, 1)])
def test_the_naive_twin_reads_each_row_by_itself(lengths: list[int], heads: int, queries: int, bias: bool) -> None:
    paged = pages_of(lengths, bias=bias)
    paged = replace(paged, keys=paged.keys.nan_to_num(), values=paged.values.nan_to_num())
    q = torch.randn(len(lengths) // heads, 2 * heads, queries, 16, device=DEVICE)
    out, lse = row_by_row(q, paged, 0.3)
    found = naive.paged_attend(q, paged, scale=0.3)
    torch.testing.assert_close(found.out.double(), out, atol=1e-5, rtol=1e-5)
    assert found.lse is not None
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("way", "programs", "bias"),
    [
        *itertools.product(WAYS[:1], (0, 1, 3, 7, 40), (False, True)),
        *itertools.product(WAYS[1:], (3, 40), (False,)),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "group", "queries", "dim", "value_dim"),
    [
        ([5, 33, 1, 16], 3, 1, 64, 64),
        ([0, 48], 1, 1, 80, 80),
        ([200, 1], 4, 2, 96, 32),
        ([17, 64, 65, 3], 16, 1, 16, 16),
        ([40, 90], 1, 16, 256, 256),
        ([0, 0, 0], 2, 1, 32, 32),
        ([1] * 20 + [150, 0] + [2] * 9, 1, 1, 16, 16),
        ([640, 3, 65], 8, 16, 64, 64),  # parts of the first are joined in four slices
        ([20, 400], 16, 1, 16, 128),  # in eight
    ],
)
def test_triton_reads_what_the_rows_hold(
    lengths: list[int],
    group: int,
    queries: int,
    dim: int,
    value_dim: int,
    bias: bool,
    programs: int,
    way: dict[str, Any],
) -> None:
    paged = pages_of(lengths, dim=dim, value_dim=value_dim, bias=bias)
    q = torch.randn(1, len(lengths) * group, queries, dim, device=DEVICE)
    out, lse = row_by_row(q, paged, dim**-0.5)
    found, found_lse = triton_read(q, paged, dim**-0.5, programs, way=way)
    torch.testing.assert_close(found.double(), out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("programs", [0, 1, 3, 7, 40])
@pytest.mark.parametrize(("length", "rows"), [(0, 2), (1, 5), (16, 3), (50, 8), (130, 1)])
def test_triton_reads_rows_of_one_length(length: int, rows: int, programs: int) -> None:
    paged = pages_of([length] * rows)
    q = torch.randn(1, rows * 2, 1, 16, device=DEVICE)
    found, found_lse = triton_read(q, paged, 0.25, programs, even=True)
    out, lse = row_by_row(q, paged, 0.25)
    torch.testing.assert_close(found.double(), out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_reads_half_precision(dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes in numpy, which has no bfloat16 products")
    paged = pages_of([130, 7], dim=64, page=64, dtype=dtype)
    q = torch.randn(1, 8, 1, 64, device=DEVICE).to(dtype)
    out, lse = row_by_row(q, paged, 0.125)
    found, found_lse = triton_read(q, paged, 0.125, 1)
    torch.testing.assert_close(found.double(), out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found_lse.double(), lse, atol=1e-2, rtol=1e-2)


def test_channels_are_shared_out_among_helpers_without_a_rest() -> None:
    with pytest.raises(OptionError, match="helpers=3"):
        plan_read(2, 8, 1, 16, torch.device("cpu"), helpers=3)


@pytest.mark.parametrize(
    ("rows", "pages", "dim", "way", "programs"),
    [
        (8, 128, 128, {"even": True}, 128),
        (8, 4096, 128, {"even": True}, 128),  # a program a multiprocessor, if it is read in whole rows
        (64, 8192, 128, {"even": True}, 128),
        (8, 4096, 64, {"even": True}, 256),
        (64, 32768, 128, {"even": True}, 512),  # as many as have room at once
        (512, 32768, 128, {"even": True}, 512),
        (1024, 32768, 128, {"even": True}, 1024),
        (560, 35840, 128, {"even": True}, 528),
        (160, 5120, 128, {}, 528),
        (320, 20480, 64, {"even": True}, 528),
        (560, 36000, 128, {}, 528),
        (8, 4096, 128, {}, 216),
        (128, 8192, 128, {}, 192),
        (128, 16384, 128, {}, 528),
        (40, 20480, 128, {}, 528),
        (64, 4096, 128, {"even": True, "coded": True}, 512),
        (64, 32768, 128, {"even": True, "coded": True}, 1024),
        (560, 35840, 128, {"even": True, "coded": True}, 1056),
    ],
)
def test_plans_that_were_the_fastest_measured_of_132_multiprocessors(
    rows: int, pages: int, dim: int, way: dict[str, Any], programs: int
) -> None:
    assert cut_read(rows, pages, 4, dim, 132, **way).programs == programs


@given(st.integers(1, 300), st.integers(0, 3000), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans())
def test_every_page_has_a_program(rows: int, more: int, each: int, even: bool, coded: bool, wide: bool) -> None:
    pages = rows * (1 + more // rows) if even else rows + more
    cut = cut_read(rows, pages, 4, 128 if wide else 64, each, even=even, coded=coded)
    assert 1 <= cut.programs <= cut.grid <= cut.programs + rows
    assert not cut.late or (cut.aligned and cut.few)


def test_strided_queries_are_read_as_they_stand() -> None:
    paged = pages_of([20, 31])
    q = torch.randn(1, 1, 4, 16, device=DEVICE).transpose(1, 2)
    found, _ = triton_read(q, paged, 0.25)
    torch.testing.assert_close(found.double(), row_by_row(q, paged, 0.25)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["naive", "triton"])
def test_append_writes_one_entry_a_row_and_nothing_else(kernel: str) -> None:
    lengths = [0, 15, 16, 33, 47, 2]  # 2 sequences of 3 heads, at the begin, end and middle of pages
    paged = pages_of(lengths, dim=24, value_dim=40, room=1)
    before = replace(paged, keys=paged.keys.clone(), values=paged.values.clone(), positions=paged.positions.clone())
    k = torch.randn(2, 1, 3, 24, device=DEVICE).transpose(1, 2)
    v = torch.randn(2, 3, 1, 40, device=DEVICE)
    positions = torch.tensor([100, 7], device=DEVICE)
    if kernel == "triton":
        pytest.importorskip("triton")
        from kvthrift.kernels.triton.append import append

        append(k, v, positions, paged)
    else:
        naive.paged_append(k, v, positions, paged)
    assert paged.lengths.tolist() == [n + 1 for n in lengths]
    for row, n in enumerate(lengths):
        page, place = int(paged.table[row, n // 16]), n % 16
        torch.testing.assert_close(paged.keys[page, place], k[row // 3, row % 3, 0])
        torch.testing.assert_close(paged.values[page, place], v[row // 3, row % 3, 0])
        assert paged.positions[page, place] == positions[row // 3]
        for old, new in ((before.keys, paged.keys), (before.values, paged.values), (before.positions, paged.positions)):
            new[page, place] = old[page, place]
    torch.testing.assert_close(paged.keys, before.keys, equal_nan=True)
    torch.testing.assert_close(paged.values, before.values, equal_nan=True)
    assert torch.equal(paged.positions, before.positions)


def test_several_entries_are_appended_one_after_the_other() -> None:
    paged = pages_of([14, 3], dim=8, value_dim=4, room=4)
    twin = replace(paged, **{name: getattr(paged, name).clone() for name in ("keys", "values", "positions", "lengths")})
    k, v = torch.randn(2, 1, 4, 8, device=DEVICE), torch.randn(2, 1, 4, 4, device=DEVICE)
    positions = torch.tensor([[4, 5, 6, 9], [20, 21, 22, 23]], device=DEVICE)
    paged_append(k, v, positions, paged)
    for i in range(4):
        naive.paged_append(k[:, :, i : i + 1], v[:, :, i : i + 1], positions[:, i], twin)
    for name in ("keys", "values", "positions", "lengths"):
        torch.testing.assert_close(getattr(paged, name), getattr(twin, name), equal_nan=True)
    index = paged.table[0, 1].long()
    assert paged.positions[index, :2].tolist() == [6, 9]
    torch.testing.assert_close(paged.keys[index, 1], k[0, 0, 3])


def test_dispatch_says_why_the_fast_kernels_do_not_fit() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert "cpu" in str(unfit(cpu, torch.bfloat16, 64, 64, 64))
    if torch.cuda.is_available():
        assert unfit(cuda, torch.bfloat16, 64, 64, 64) is None
        assert "512" in str(unfit(cuda, torch.bfloat16, 512, 512, 64))
        assert "48" in str(unfit(cuda, torch.bfloat16, 64, 64, 48))
        assert "float64" in str(unfit(cuda, torch.float64, 64, 64, 64))


def test_dispatch_answers_alike_wherever_it_goes() -> None:
    paged = pages_of([20, 31], room=1)
    k, v = torch.randn(2, 1, 1, 16, device=DEVICE), torch.randn(2, 1, 1, 16, device=DEVICE)
    paged_append(k, v, torch.tensor([3, 4], device=DEVICE), paged)
    q = torch.randn(2, 4, 1, 16, device=DEVICE)
    found = paged_attend(q, replace(paged, keys=paged.keys.nan_to_num(), values=paged.values.nan_to_num()), scale=0.25)
    torch.testing.assert_close(found.out.double(), row_by_row(q, paged, 0.25)[0], atol=1e-5, rtol=1e-5)


def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
