"""Kernels that score, against the same written out in float64; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.views import layer_view, plain_rope
from tests.views import moments as moments_of
from torch import Tensor

from kvthrift import kernels
from kvthrift.allocate import AdaptiveHeads
from kvthrift.core import Rope
from kvthrift.score import ExpectedAttention, Scorer, WindowAttention
from kvthrift.select import TokenUnit

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
CLOSE = 2e-5 if DEVICE == "cpu" else 2e-4  # a GPU multiplies float32 in three parts of fewer digits
HALF = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter has no bfloat16 products


class Case:
    """Queries and entries of two sequences, the second padded, with NaN in what must not be looked at."""

    def __init__(self, group: int, queries: int, entries: int, dim: int, *, bias: bool = False) -> None:
        b, h = 2, 2
        self.q = torch.randn(b, queries, h * group, dim, device=DEVICE).transpose(1, 2)  # strides as a model's
        self.k = torch.randn(b, h, entries, dim, device=DEVICE)
        self.bias = torch.rand(b, h, entries, device=DEVICE) * 3 if bias else None
        step = torch.arange(entries, device=DEVICE)
        lengths = torch.tensor([[entries, max(entries - 7, 1)], [entries // 2, 0]], device=DEVICE)
        self.valid = step < lengths[..., None]
        self.k_positions = (step * 2 + 1).expand(b, h, entries)
        self.q_positions = (torch.arange(queries, device=DEVICE) * 3 + entries // 2).expand(b, queries).clone()
        self.q_positions[1, queries // 2 :] = -1
        self.scale = dim**-0.5

    def cast(self, dtype: torch.dtype) -> Case:
        self.q, self.k = self.q.to(dtype), self.k.to(dtype)
        return self

    def rows(self) -> tuple[Tensor, Tensor]:
        """Attention ``[B, H, G, Q, T]`` and its log-sum-exp, in float64."""
        b, h, _, dim = self.k.shape
        q = self.q.double().reshape(b, h, -1, self.q.shape[2], dim)
        logits = torch.einsum("bhgqd,bhtd->bhgqt", q, self.k.double()) * self.scale
        if self.bias is not None:
            logits = logits + self.bias[:, :, None, None].double()
        seen = self.valid[:, :, None, None] & (
            self.k_positions[:, :, None, None] <= self.q_positions[:, None, None, :, None]
        )
        logits = logits.masked_fill(~seen, -torch.inf)
        return logits.softmax(dim=-1).nan_to_num(0.0), logits.logsumexp(dim=-1)

    def norms(self) -> Tensor:
        from kvthrift.kernels.triton.norms import norms

        return norms(self.q, self.k, self.q_positions, self.k_positions, self.valid, self.scale, self.bias)

    def sums(self, lse: Tensor, power: int, buffer: int, together: bool) -> Tensor:
        from kvthrift.kernels.triton.sums import sums

        given = (self.q, self.k, lse, self.q_positions, self.k_positions, self.valid, self.scale, self.bias)
        return sums(*given, power=power, buffer=buffer, together=together)


CASES = [(1, 1, 1, 64), (4, 32, 63, 64), (3, 33, 65, 80), (16, 2, 64, 16), (2, 17, 130, 128), (1, 20, 70, 256)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", CASES)
def test_norms_are_log_sum_exps_over_what_a_query_sees(sizes: tuple[int, int, int, int], bias: bool) -> None:
    case = Case(*sizes, bias=bias)
    _, lse = case.rows()
    found = case.norms().double()
    assert torch.equal(found.isneginf(), lse.flatten(1, 2).isneginf())
    torch.testing.assert_close(found.exp(), lse.flatten(1, 2).exp(), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("power", "buffer", "bias"), [(1, 0, False), (2, 0, True), (1, 10, True), (2, 200, False)])
@pytest.mark.parametrize("sizes", [*CASES, (1, 150, 140, 16)])
def test_sums_are_what_entries_receive(
    sizes: tuple[int, int, int, int], power: int, buffer: int, bias: bool, together: bool
) -> None:
    case = Case(*sizes, bias=bias)
    rows, lse = case.rows()
    near = case.k_positions[:, :, None, None] > case.q_positions[:, None, None, :, None] - buffer
    wanted = (rows**power).masked_fill(near, 0.0).sum(dim=3)
    found = case.sums(lse.flatten(1, 2).float(), power, buffer, together)
    torch.testing.assert_close(found.double(), wanted, atol=CLOSE, rtol=CLOSE)
    assert (found[~case.valid[:, :, None].expand_as(found)] == 0).all()


def test_a_long_prompt_is_summed_with_and_without_masks() -> None:
    """Blocks of queries that see nothing, some and all of an entry block; ends on no block's boundary."""
    case = Case(2, 333, 333, 16)
    case.k_positions = torch.arange(333, device=DEVICE).expand(2, 2, 333)
    case.q_positions = torch.arange(333, device=DEVICE).expand(2, 333).clone()
    case.q_positions[1, 100:] = -1
    rows, lse = case.rows()
    found = case.sums(lse.flatten(1, 2).float(), 1, 0, False)
    torch.testing.assert_close(found.double(), rows.sum(dim=3), atol=3 * CLOSE, rtol=CLOSE)
    total = found[0, 0].sum(dim=-1).double()  # a head that holds every entry: one for each query
    torch.testing.assert_close(total, torch.full((2,), 333.0, device=DEVICE).double(), atol=1e-3, rtol=1e-5)


def test_sums_do_not_overflow_where_a_query_may_not_look() -> None:
    case = Case(1, 40, 40, 64)
    case.k_positions = torch.arange(40, device=DEVICE).expand(2, 2, 40)
    case.q_positions = torch.arange(40, device=DEVICE).expand(2, 40)
    case.k[:, :, -1] *= 1e4
    _, lse = case.rows()
    assert case.sums(lse.flatten(1, 2).float(), 1, 0, False).isfinite().all()


def test_the_order_of_queries_does_not_matter() -> None:
    case = Case(2, 200, 200, 64)
    rows, lse = case.rows()
    order = torch.randperm(200, device=DEVICE)
    case.q, case.q_positions = case.q[:, :, order], case.q_positions[:, order]
    found = case.sums(lse.flatten(1, 2).float()[..., order], 1, 0, False)
    torch.testing.assert_close(found.double(), rows.sum(dim=3), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_norms_and_sums_of_half_precision(dtype: torch.dtype, dim: int) -> None:
    case = Case(4, 32, 130, dim).cast(dtype)
    rows, lse = case.rows()
    found = case.norms()
    torch.testing.assert_close(found.exp().double(), lse.flatten(1, 2).exp(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(case.sums(found, 1, 0, True).double(), rows.sum(dim=3), atol=1e-4, rtol=1e-3)


def test_windows_sum_to_rows_summed() -> None:
    case = Case(3, 20, 65, 32, bias=True)
    rows, _ = case.rows()
    found = kernels.window_sums(
        case.q, case.k, q_positions=case.q_positions, k_positions=case.k_positions, valid=case.valid, scale=case.scale,
        bias=case.bias, powers=(1, 2),
    )  # fmt: skip
    for power, sums in zip((1, 2), found, strict=True):
        torch.testing.assert_close(sums.double(), (rows**power).sum(dim=3), atol=1e-5, rtol=1e-4)


# -- moments, forms -----------------------------------------------------------------------------------------------


def turned(dim: int, rotated: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Rope]:
    q = (torch.randn(2, queries, 6, dim, device=DEVICE) + 0.3).transpose(1, 2).to(dtype)
    positions = torch.arange(queries, device=DEVICE)[None] + torch.tensor([[0], [1000]], device=DEVICE)
    use = torch.rand(2, queries, device=DEVICE) < 0.8
    rope = Rope(1 / 500.0 ** (torch.arange(0, rotated, 2, device=DEVICE).float() / rotated), 1.3)
    return q, positions, use, rope


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 80), (96, 20), (128, 64), (256, 256), (8, 4)])
@pytest.mark.parametrize("queries", [1, 65])
def test_moments_are_of_queries_before_their_rotation(dim: int, rotated: int, queries: int, dtype: torch.dtype) -> None:
    from kvthrift.kernels.triton.moments import moments

    q, positions, use, rope = turned(dim, rotated, queries, dtype)
    plain = rope.rotate(q.float(), -positions[:, None]).double() / 1.3 * use[:, None, :, None]
    angles = rope.angles(positions)
    q = q.masked_fill(~use[:, None, :, None], NAN)  # what does not count is not looked at
    total, outer = moments(q, angles.cos(), angles.sin(), use, 1 / 1.3)
    torch.testing.assert_close(total.double(), plain.sum(dim=2), atol=1e-3, rtol=1e-5)
    relative = CLOSE if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 1e-3
    expected = plain.transpose(-1, -2) @ plain
    torch.testing.assert_close(outer.double(), expected, atol=relative * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "dim"), [(6, 64), (6, 80), (2, 128), (6, 8)])
@pytest.mark.parametrize("queries", [1, 63, 65, 1100])
def test_moments_of_heads_that_are_turned_as_a_whole(heads: int, dim: int, queries: int, dtype: torch.dtype) -> None:
    from kvthrift.kernels.triton.halves import moments, takes

    q, positions, use, rope = turned(dim, dim, queries, dtype)
    q, positions, use = q[1:, :heads], positions[1:], use[1:]  # of few heads a program takes a part
    assert takes(q, dim // 2)
    plain = rope.rotate(q.float(), -positions[:, None]).double() / 1.3 * use[:, None, :, None]
    turns = kernels.query_turns(q, positions, rope) or [x.half() for x in angles_of(rope, positions)]
    total, outer = moments(q.masked_fill(~use[:, None, :, None], NAN), *turns, use, 1 / 1.3)
    torch.testing.assert_close(total.double(), plain.sum(dim=2), atol=1e-3 * max(queries, 64) ** 0.5, rtol=1e-3)
    expected = plain.transpose(-1, -2) @ plain
    relative = 1e-2 if dtype == torch.bfloat16 and queries < 1000 else 1e-3
    torch.testing.assert_close(outer.double(), expected, atol=relative * float(expected.abs().max()), rtol=0)
    assert torch.equal(outer, outer.transpose(-1, -2))


def angles_of(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = rope.angles(positions)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("dim", "rotated", "dtype"), [(64, 32, HALF[0]), (256, 256, HALF[0]), (64, 64, torch.float32)])
def test_other_heads_are_left_to_the_other_kernel(dim: int, rotated: int, dtype: torch.dtype) -> None:
    from kvthrift.kernels.triton.halves import takes

    assert not takes(turned(dim, rotated, 1, dtype)[0], rotated // 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("dim", "group", "entries"), [(64, 4, 1), (80, 1, 63), (96, 3, 65), (128, 2, 65), (256, 1, 20)]
)
def test_forms_lose_little_more_than_float32_does(
    dim: int, group: int, entries: int, spread: bool, dtype: torch.dtype
) -> None:
    from kvthrift.kernels.triton.forms import forms

    k = torch.randn(2, entries, 2, dim, device=DEVICE).transpose(1, 2).to(dtype)
    mean = torch.randn(2, 2 * group, dim, device=DEVICE)
    root = (
        torch.randn(2, 2 * group, dim, dim, device=DEVICE)
        * torch.tensor([1e-3, 30.0], device=DEVICE)[:, None, None, None]
    )
    matrix = root @ root.transpose(-1, -2) if spread else None
    found = forms(k, mean, matrix)
    wide = k.double().repeat_interleave(group, dim=1)
    wanted = (wide * mean[:, :, None].double()).sum(dim=-1)
    size = wide.abs() @ mean.abs()[..., None].double()
    if matrix is not None:
        wanted = wanted + ((wide @ matrix.double()) * wide).sum(dim=-1)
        size = size + ((wide.abs() @ matrix.abs().double()) * wide.abs()).sum(dim=-1, keepdim=True)
    error = (found.flatten(1, 2).double() - wanted).abs() / size[..., 0]
    assert float(error.max()) < (2e-6 if DEVICE == "cpu" else 2e-5)


def test_moments_and_logits_dispatch_to_the_same_numbers() -> None:
    q, positions, use, rope = turned(32, 32, 70, torch.float32)
    total, outer = kernels.query_moments(q, positions, use, rope)
    plain = rope.rotate(q.double().float(), -positions[:, None]).double() / 1.3 * use[:, None, :, None]
    torch.testing.assert_close(total.double(), plain.sum(dim=2), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(outer.double(), plain.transpose(-1, -2) @ plain, atol=1e-2, rtol=1e-4)
    k, mean = torch.randn(2, 3, 40, 32, device=DEVICE), torch.randn(2, 6, 32, device=DEVICE)
    found = kernels.gaussian_logits(k, mean, outer / 70, 0.2)
    wide = k.double().repeat_interleave(2, dim=1)
    wanted = (wide * mean[:, :, None]).sum(-1) * 0.2 + ((wide @ outer.double() / 70) * wide).sum(-1) * 0.02
    torch.testing.assert_close(found.flatten(1, 2).double(), wanted, atol=1e-3, rtol=1e-4)


# -- the largest --------------------------------------------------------------------------------------------------


def awkward(entries: int) -> Tensor:
    """Rows of ties, zeros of both signs, infinities and runs of equal numbers."""
    scores = torch.randn(2, 4, entries)
    scores[0] = scores[0].round()
    scores[1, 0], scores[1, 1, ::2], scores[1, 1, 1::2] = 0.0, -0.0, 0.0
    scores[0, 0, ::7], scores[0, 1, 1::7] = NAN, -NAN  # a broken model's: above all, as in a sort
    scores[1, 2, :2], scores[1, 3, ::3], scores[1, 3, 1::3] = torch.inf, -torch.inf, torch.inf
    return scores.to(DEVICE)


@pytest.mark.parametrize("entries", [1, 63, 64, 65, 1000, 20000])
@pytest.mark.parametrize("piece", [0, 512, 2048])
def test_the_best_are_those_of_a_stable_sort(entries: int, piece: int) -> None:
    from kvthrift.kernels.triton import best as short
    from kvthrift.kernels.triton import best_long as long

    best = partial(long.best, piece=piece) if piece else short.best
    scores = awkward(entries)
    order = scores.cpu().argsort(dim=-1, descending=True, stable=True)
    for counts in (torch.randint(0, entries + 2, (2, 4)), torch.tensor([[0, 1, entries, entries // 2]] * 2)):
        wanted = torch.zeros(2, 4, entries, dtype=torch.bool)
        for i in range(2):
            for j in range(4):
                wanted[i, j, order[i, j, : int(counts[i, j])]] = True
        assert torch.equal(best(scores, counts.to(DEVICE)).cpu(), wanted)
        assert torch.equal(kernels.best(scores, counts.to(DEVICE)).cpu(), wanted)


# -- what calls them ----------------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]]:
    """What a call gives without kernels and with them, in the interpreter; on a GPU ``tests/gpu`` compares the two."""
    if DEVICE == "cuda":
        pytest.skip("kernels do not take tensors of the CPU where there is a GPU")

    def both(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr("kvthrift.kernels.fit.unfit", lambda *_: "not wanted")
            naive = call()
            patch.setattr("kvthrift.kernels.fit.unfit", lambda *_: None)
            return naive, call()

    return both


@pytest.mark.parametrize(
    "scorer",
    [
        WindowAttention(window=6),
        WindowAttention(window=6, queries="sum", pool="avg", kernel=5, group="max", pool_first=False),
        WindowAttention(window=6, variance=200.0),
        ExpectedAttention(future=8),
        ExpectedAttention(future=8, covariance=False, value_norm=False, epsilon=0.02),
    ],
    ids=str,
)
def test_scorers_give_the_same_with_kernels(scorer: Scorer, forced: Any) -> None:
    view = layer_view(batch=2, heads=2, group=2, lengths=[[40, 33], [9, 1]], seen=50, window=9, dim=16)
    view.rope, view.moments = plain_rope(16), moments_of(torch.randn(2, 4, 30, 16))
    view.bias = torch.rand(2, 2, 40)
    assert view.query_positions is not None
    view.query_positions[1, :5] = -1
    naive, fast = forced(lambda: scorer.score(view))
    torch.testing.assert_close(fast[view.valid], naive[view.valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("power", "buffer"), [(1, 0), (2, 7)])
@pytest.mark.parametrize("queries", [5, 70])
def test_sums_are_the_same_with_kernels(power: int, buffer: int, queries: int, forced: Any) -> None:
    case = Case(2, queries, 80, 16, bias=True)
    _, lse = case.rows()
    where = {"q_positions": case.q_positions, "k_positions": case.k_positions, "valid": case.valid, "bias": case.bias}
    naive, fast = forced(
        lambda: kernels.power_sums(
            case.q, case.k, scale=case.scale, lse=lse.flatten(1, 2).float(), power=power, buffer=buffer, **where
        )
    )
    torch.testing.assert_close(fast, naive, atol=1e-4, rtol=1e-4)


def test_moments_and_choices_are_the_same_with_kernels(forced: Any) -> None:
    q, positions, use, rope = turned(16, 16, 40, torch.float32)
    naive, fast = forced(lambda: kernels.query_moments(q, positions, use, rope)[1])
    torch.testing.assert_close(fast, naive, atol=1e-2, rtol=1e-4)
    view = layer_view(batch=2, heads=2, lengths=[[40, 33], [9, 1]], window=0)
    scores = torch.rand(2, 2, 40).round(decimals=1)
    counts = torch.tensor([[5, 40], [3, 1]])
    none = torch.zeros_like(view.valid)
    for call in (
        lambda: TokenUnit().select(scores, counts, none, view),
        lambda: AdaptiveHeads().split(scores.masked_fill(~view.valid, -torch.inf), torch.tensor([9, 3]), view),
        lambda: AdaptiveHeads(blend=0.5).split(scores.masked_fill(~view.valid, -torch.inf), torch.tensor([9, 3]), view),
    ):
        naive, fast = forced(call)
        assert torch.equal(naive, fast)


def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_scores.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
