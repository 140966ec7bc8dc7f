"""Sums by products in 8 bits: kernels against their twins in torch, and both against what nothing was rounded for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.test_scores import DEVICE, HALF, NAN, Case
from torch import Tensor

from kvthrift import kernels
from kvthrift.kernels import naive_scores
from kvthrift.kernels.naive_int8 import KEY_BLOCK, rounded, turn

pytest.importorskip("triton")
SIZES = [(1, 1, 1, 64), (4, 32, 63, 64), (3, 33, 65, 80), (16, 2, 64, 16), (2, 17, 130, 128), (1, 20, 70, 256)]
TURN = 3e-3 if DEVICE == "cuda" else 2e-3  # of the largest: numbers half way between two levels may fall either way
Sums = tuple[Tensor, Tensor, Tensor]


def all_of(case: Case, power: int = 1, buffer: int = 0, **more: Any) -> Sums:
    """What entries receive: by the kernel, by its twin, and in float64 without rounding."""
    from kvthrift.kernels.triton.sums_int8 import sums_int8

    rows, lse = case.rows()
    norms = lse.flatten(1, 2).float()
    where = (case.q_positions, case.k_positions, case.valid)
    found = sums_int8(case.q, case.k, norms, *where, case.scale, case.bias, power=power, buffer=buffer, **more)
    twin = naive_scores.power_sums(
        case.q, case.k, q_positions=where[0], k_positions=where[1], valid=where[2], scale=case.scale, lse=norms,
        power=power, buffer=buffer, bias=case.bias, block=50, products="int8",
    )  # fmt: skip
    near = case.k_positions[:, :, None, None] > case.q_positions[:, None, None, :, None] - buffer
    return found, twin, (rows**power).masked_fill(near, 0.0).sum(dim=3)


def off(found: Tensor, wanted: Tensor) -> float:
    """The sum of differences over the sum."""
    return float((found.double() - wanted.double()).abs().sum() / wanted.double().abs().sum().clamp(min=1e-9))


def same(found: Tensor, twin: Tensor) -> None:
    torch.testing.assert_close(found, twin, atol=TURN * max(float(twin.max()), 1e-9), rtol=0)
    assert off(found, twin) < TURN / 4


def prompt(group: int, length: int, dim: int) -> Case:
    """Every query sees all entries up to its own; the second sequence is short, and its end is no number."""
    case = Case(group, length, length, dim)
    case.k_positions = torch.arange(length, device=DEVICE).expand(2, 2, length)
    case.q_positions = torch.arange(length, device=DEVICE).expand(2, length).clone()
    case.q_positions[1, 100:] = -1
    return case


def poisoned(case: Case) -> Case:
    case.q = case.q.masked_fill((case.q_positions < 0)[:, None, :, None], NAN)
    case.k = case.k.masked_fill(~case.valid[..., None], NAN)
    return case


@pytest.mark.parametrize(("power", "buffer", "bias"), [(1, 0, False), (2, 0, True), (1, 10, True), (2, 200, False)])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_their_twins_and_little_off(
    sizes: tuple[int, int, int, int], power: int, buffer: int, bias: bool
) -> None:
    case = Case(*sizes, bias=bias)
    wanted = all_of(case, power, buffer)[2]
    clean = case.rows()
    case.rows = lambda: clean  # type: ignore[method-assign]  # float64 has no care for what is not there
    found, twin, _ = all_of(poisoned(case), power, buffer)
    same(found, twin)
    assert off(found, wanted) < 0.01 * power
    assert (found[~case.valid[:, :, None].expand_as(found)] == 0).all()


@pytest.mark.parametrize("more", [{}, {"tile": (256, 64)}, {"tile": (64, 128)}], ids=str)
def test_a_long_prompt_is_summed_with_and_without_masks(more: dict[str, Any]) -> None:
    case = prompt(2, 333, 64)
    found, twin, wanted = all_of(case, **more)
    same(found, twin)
    assert off(found, wanted) < 0.005
    total = found[0, 0].sum(dim=-1)  # a head that holds every entry: about one for each query
    torch.testing.assert_close(total, torch.full((2,), 333.0, device=DEVICE), atol=0.5, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_vectors_of_half_precision(dtype: torch.dtype) -> None:
    found, twin, wanted = all_of(prompt(4, 130, 128).cast(dtype))
    same(found, twin)
    assert off(found, wanted) < 0.005


def test_what_all_keys_or_all_queries_have_in_common_costs_no_levels() -> None:
    """With levels of 40 / 127 for numbers of about 1, sums would be anything."""
    case = prompt(2, 200, 64)
    case.k = case.k + 40 * torch.randn(1, 2, 1, 64, device=DEVICE).sign()
    case.q = case.q + 4 * torch.randn(1, 4, 1, 64, device=DEVICE).sign()
    case.scale /= 4
    found, twin, wanted = all_of(case)
    same(found, twin)
    assert off(found, wanted) < 0.01


def test_a_channel_that_stands_out_costs_others_few_levels() -> None:
    """Some keys have a channel a hundred times as large, which queries hardly look at."""
    case = prompt(2, 200, 128)
    case.k[..., 5] *= 100 * torch.randn(2, 2, 200, device=DEVICE).sign()
    case.q[..., 5] /= 100
    found, twin, wanted = all_of(case)
    same(found, twin)
    assert off(found, wanted) < 0.04


def test_an_entry_that_all_queries_look_at_stays_within_float32() -> None:
    """What queries have in common makes large logits with two keys, whose factors keep within bounds."""
    case = prompt(2, 200, 64)
    case.q = case.q + 1
    case.k[:, :, 0] += 20
    case.k[:, :, 7] -= 20
    made = rounded(case.q, case.k, case.q_positions, case.valid, case.scale, 1)
    assert case.scale * 64 * 20 * 1.4427 > 90
    assert float(made.shifts.abs().amax()) * 1.4427 < 90.01
    found, twin, wanted = all_of(case)
    assert found.isfinite().all()
    same(found, twin)
    assert off(found, wanted) < 0.05  # what is out of reach stays with the products


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("of", ["q", "k"])
@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_what_is_not_a_number_is_not_hidden(of: str, number: float) -> None:
    case = prompt(1, 70, 64)
    getattr(case, of)[0, 1, 3, 2] = number
    lse = torch.zeros(2, 2, 70, device=DEVICE)
    case.rows = lambda: (torch.zeros(2, 2, 1, 70, 70, device=DEVICE), lse[:, :, None])  # type: ignore[method-assign]
    found, twin, _ = all_of(case)
    for sums in (found, twin):
        assert sums[0, 1, :, :63].isnan().all()  # the entries there are
        assert sums[0, 0].isfinite().all()
        assert sums[1].isfinite().all()


def test_rounded_vectors_are_levels_of_what_is_left_of_them() -> None:
    from kvthrift.kernels.triton.quantize import coarse

    case = poisoned(prompt(2, 150, 80))
    lse = torch.zeros(2, 4, 150, device=DEVICE)
    made = coarse(case.q, case.k, lse, case.q_positions, case.valid, case.scale, power=2, rows=160)
    twin = rounded(case.q, case.k, case.q_positions, case.valid, case.scale, 2)
    assert made.queries.shape == (2, 4, 160, 128)
    assert made.keys.shape == (2, 2, 160, 128)
    steps = made.steps.repeat_interleave(KEY_BLOCK, dim=-1)[:, :, :150, None] / 64
    found = ((made.keys[:, :, :150] * steps - twin.keys) / steps.clamp(min=1e-9)).abs()
    assert float(found.max()) < 1.01  # a level
    assert float((found > 0.01).float().mean()) < 1e-3  # all but what is half way between two levels
    assert int(made.keys[0, 0].abs().max()) == 127
    assert (made.queries.abs().amax(dim=-1)[0, :, :150] == 127).all()
    assert (made.queries[:, :, 150:] == 0).all()
    assert (made.norms[:, :, 150:] == -torch.inf).all()
    assert (made.norms[1, :, 100:] == -torch.inf).all()
    stretch = 2 * 1.4426950408889634
    torch.testing.assert_close(made.norms[0, :, :150], twin.offsets[0] * stretch, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.shifts, twin.shifts * stretch, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [32, 64])
def test_a_turn_keeps_products_and_leaves_nothing_in_few_channels(size: int) -> None:
    made = turn(size)
    assert torch.equal(made @ made.T, size * torch.eye(size))
    assert float(made.sum(dim=0).abs().max()) == 8


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU tests/gpu compares the two")
def test_what_is_asked_for_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel where there is one, by the twin elsewhere; the same numbers, which are not the exact ones."""
    case = prompt(2, 90, 64)
    lse = case.rows()[1].flatten(1, 2).float()
    where = {"q_positions": case.q_positions, "k_positions": case.k_positions, "valid": case.valid}
    given: dict[str, Any] = {**where, "scale": case.scale, "lse": lse, "power": 1}
    twin = kernels.power_sums(case.q, case.k, products="int8", **given)
    exact = kernels.power_sums(case.q, case.k, **given)
    monkeypatch.setattr("kvthrift.kernels.fit.unfit", lambda *_: None)
    found = kernels.power_sums(case.q, case.k, products="int8", **given)
    same(found, twin)
    assert 1e-5 < off(found, exact) < 0.01
