"""The reader of int4 pages by warps against the naive twin.

Without a GPU the kernel's own statements are run by ``gluon_stand_in.py``; with one, the kernel is.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels import gluon_stand_in

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
from kvthrift.kernels import plan_read
from kvthrift.kernels.codes import Coded, write_keys, write_values
from kvthrift.kernels.paged import Paged, paged_attend
from kvthrift.kernels.triton import read_int4
from kvthrift.part import parts

SCALE = 128**-0.5
CODED, PAGED = ("keys", "values", "key_marks", "value_marks"), ("keys", "values", "positions", "table", "lengths")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pages_of(lengths: list[int], group: int, *, keys: float = 2.0, values: float = 1.0) -> tuple[torch.Tensor, Paged]:
    """Random pages in int4 for rows of given lengths, in any order, others' numbers poisoned; queries for them."""
    torch.manual_seed(0)
    rows, width = len(lengths), max(1, max(-(-n // 64) for n in lengths))
    count = rows * width + 3
    table = torch.randperm(count)[: rows * width].view(rows, width).int()
    form = parts()["codec"]["int4"].format
    coded = Coded(
        form, torch.zeros(count, 64, 32, dtype=torch.int16), torch.zeros(count, 32, 64, dtype=torch.int16),
        torch.full((count, 2, 128), torch.nan).half(), torch.full((count, 2, 1, 64), torch.nan).half(),
    )  # fmt: skip
    own = torch.cat([table[i, : -(-n // 64)] for i, n in enumerate(lengths)]).long()
    write_keys(coded, own, torch.randn(len(own), 64, 128) * keys + keys / 2)
    write_values(coded, own, torch.randn(len(own), 64, 128) * values)
    tail = torch.randn(2, rows, 64, 128).bfloat16()
    for i, n in enumerate(lengths):
        tail[0, i, (n - 1) % 64 + 1 :] = 3e4  # finite, and in nobody's sight
    q = torch.randn(1, rows * group, 1, 128).bfloat16()
    at = torch.zeros(count, 64, dtype=torch.int32)
    return q, Paged(tail[0], tail[1], at, table, torch.tensor(lengths, dtype=torch.int32), coded=coded)


class Stand:
    """In the kernel's place: has its statements run."""

    fn = read_int4._read.fn

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*given: Any, **rest: Any) -> None:
            rest = {name: x for name, x in rest.items() if name not in ("num_warps", "maxnreg")}
            gluon_stand_in.launch(read_int4, "_read", grid[0], *given, **rest)

        return run


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(read_int4, "_read", Stand())


def read(q: torch.Tensor, paged: Paged, programs: int, *, even: bool, stages: int = 2) -> Any:
    rows, width = paged.table.shape
    coded = paged.coded
    assert coded is not None
    moved = replace(coded, **{name: getattr(coded, name).to(DEVICE) for name in CODED})
    there = replace(paged, coded=moved, **{name: getattr(paged, name).to(DEVICE) for name in PAGED})
    plan = plan_read(rows, rows * width, q.shape[1] // rows, 128, torch.device(DEVICE), even=even, programs=programs)
    plan.parts.fill_(torch.nan)
    found = read_int4.read(q.to(DEVICE), there, SCALE, plan, stages=stages)
    assert not plan.arrived.any()
    return tuple(x.cpu() for x in found)


def close(q: torch.Tensor, paged: Paged, found: Any) -> None:
    """Row by row, with the pages that are its own."""
    group = q.shape[1] // len(paged.lengths)
    for i, length in enumerate(paged.lengths.tolist()):
        own = slice(i * group, (i + 1) * group)
        if not length:
            assert not found[0][:, own].any()
            assert (found[1][:, own] == -torch.inf).all()
            continue
        row = replace(
            paged, keys=paged.keys[i : i + 1], values=paged.values[i : i + 1], lengths=paged.lengths[i : i + 1],
            table=paged.table[i : i + 1, : -(-length // 64)],
        )  # fmt: skip
        wanted = paged_attend(q[:, own], row, scale=SCALE)
        torch.testing.assert_close(found[0][:, own].float(), wanted.out.float(), atol=0.01, rtol=0.01)
        torch.testing.assert_close(found[1][:, own], wanted.lse, atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("lengths", "group", "programs"),
    [
        ([337, 337], 4, 4),  # a part begins with the last page, another has it behind it
        ([256] * 3, 4, 2),  # programs of several rows
        ([30], 8, 1),  # nothing but the last page
        ([577, 577], 1, 5),
        ([192, 192], 2, 6),  # a program for each page
        ([0, 0], 4, 2),
    ],
)
def test_even_rows(lengths: list[int], group: int, programs: int, stages: int) -> None:
    q, paged = pages_of(lengths, group)
    close(q, paged, read(q, paged, programs, even=True, stages=stages))


@pytest.mark.parametrize("programs", [1, 2, 5, 19, 60])
def test_rows_of_any_lengths(programs: int) -> None:
    q, paged = pages_of([700, 0, 1, 64, 65, 200], 4)
    close(q, paged, read(q, paged, programs, even=False))


@pytest.mark.parametrize(("keys", "values"), [(30.0, 1.0), (2.0, 3000.0), (2.0, 1e-3), (0.01, 0.01)])
def test_numbers_of_any_size(keys: float, values: float) -> None:
    """Logits that rise from page to page by hundreds, values far from 1: the running maximum and float16 bear it."""
    q, paged = pages_of([500, 500], 4, keys=keys, values=values)
    paged.values.mul_(values)
    wanted = paged_attend(q, paged, scale=SCALE)
    out, lse = read(q, paged, 3, even=True)
    assert (out.float() - wanted.out.float()).abs().max() < 0.02 * wanted.out.float().abs().max()
    torch.testing.assert_close(lse, wanted.lse, atol=4e-3 * max(keys, 1), rtol=1e-3)


def test_what_cannot_be_a_number_is_none() -> None:
    """NaN among the keys that a row reads is NaN in what it finds, and nowhere else."""
    q, paged = pages_of([200, 200], 4)
    assert paged.coded is not None
    paged.coded.key_marks[paged.table[1, 0].long(), 0, 5] = torch.nan
    out, lse = read(q, paged, 2, even=True)
    assert out[:, :4].isfinite().all()
    assert lse[:, :4].isfinite().all()
    assert out[:, 4:].isnan().all()
