"""Pages in few bits: worked numbers, bounds that always hold, and the kernels against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_paged import DEVICE, NAN, pages_of, row_by_row
from torch import Tensor

from kvthrift.codec import Float8, Integer2, Integer4, Integer8
from kvthrift.kernels import Paged, naive, paged_append, paged_attend, plan_read, unfit
from kvthrift.kernels.codes import (
    Coded,
    Format,
    groups,
    pack,
    read_keys,
    read_values,
    unpack,
    write_keys,
    write_values,
)

FORMS = {kind.format.name: kind.format for kind in (Integer8, Integer4, Integer2, Float8)}
INTEGERS = [form for form in FORMS.values() if not form.floating]


def room(form: Format, pages: int, page: int, dim: int, value_dim: int) -> Coded:
    """Pages that nobody has written: scales and least numbers are NaN."""
    by_channel = torch.full((pages, form.marks, dim), NAN, dtype=torch.float16, device=DEVICE)
    by_token = torch.full((pages, form.marks, groups(value_dim), page), NAN, dtype=torch.float16, device=DEVICE)
    keys = torch.zeros(pages, page, dim // form.together, dtype=form.unit, device=DEVICE)
    values = torch.zeros(pages, value_dim // form.together, page, dtype=form.unit, device=DEVICE)
    return Coded(form, keys, values, by_channel, by_token)


def there_and_back(form: Format, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Coded]:
    coded = room(form, len(keys), keys.shape[1], keys.shape[2], values.shape[2])
    index = torch.arange(len(keys), device=DEVICE)
    assert write_keys(coded, index, keys.to(DEVICE))
    assert write_values(coded, index, values.to(DEVICE))
    return read_keys(coded, index, torch.float32), read_values(coded, index, torch.float32), coded


# -- numbers -----------------------------------------------------------------------------------------------------


def test_a_channel_of_keys_by_hand() -> None:
    """0 .. 3 in 2 bits: scale 1; 0 .. 30 in 4 bits: scale 2, and odd numbers go up; 1 .. 4: from 1 up."""
    keys = torch.tensor([0.0, 1.0, 2.0, 3.0])[None, :, None].expand(1, 4, 4).clone()
    found, _, coded = there_and_back(FORMS["int2"], keys, keys)
    assert torch.equal(found.cpu(), keys)
    assert coded.key_marks.tolist() == [[[1.0] * 4, [0.0] * 4]]
    assert coded.keys[0, :, 0].tolist() == [0, 0b01010101, 0b10101010, 255]
    keys = torch.tensor([0.0, 13.0, 14.0, 30.0])[None, :, None].expand(1, 4, 4).clone()
    found, _, coded = there_and_back(FORMS["int4"], keys, keys)
    assert found[0, :, 0].tolist() == [0.0, 14.0, 14.0, 30.0]
    assert coded.keys[0, :, 0].tolist() == [0, 0x7777, 0x7777, -1]  # all bits
    found, _, coded = there_and_back(FORMS["int2"], keys / 10 + 1, keys)
    assert coded.key_marks.tolist() == [[[1.0] * 4, [1.0] * 4]]
    assert found[0, :, 0].tolist() == [1.0, 2.0, 2.0, 4.0]


def test_values_are_scaled_by_token_and_keys_by_channel() -> None:
    """One wide token does not blur the others' values, one wide channel not the others' keys."""
    x = torch.tensor([[0.0, 15.0], [0.0, 1500.0]])[None].repeat(1, 1, 2)
    keys, values, coded = there_and_back(FORMS["int4"], x, x)
    assert torch.equal(keys.cpu()[..., 0], x[..., 0])
    assert torch.equal(values.cpu()[:, 0], x[:, 0])
    assert coded.key_marks[0, 0].tolist() == [0.0, 99.0] * 2
    assert coded.value_marks[0, 0, 0].tolist() == [1.0, 100.0]


def test_small_floats_by_hand() -> None:
    x = torch.tensor([448.0, 17.0, 18.0, 1.0])[None, :, None]  # a step is 2 from 16 on; ties go to even
    found, _, coded = there_and_back(FORMS["fp8"], x, x)
    assert coded.key_marks.item() == 1.0
    assert found.flatten().tolist() == [448.0, 16.0, 18.0, 1.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_level_survives_packing(bits: int) -> None:
    levels = torch.randint(0, 2**bits, (3, 8, 40), dtype=torch.uint8)
    for dim in (1, 2, -1):
        packed = pack(levels, bits, dim)
        assert packed.nbytes * 8 == levels.numel() * bits
        assert torch.equal(unpack(packed, bits, dim), levels)
    assert pack(torch.tensor([3, 1, 15, 2], dtype=torch.uint8), 4).tolist() == [0x2F13]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FORMS)),
    dim=st.sampled_from((64, 80, 96, 128, 256)),
    shift=st.sampled_from((0.0, 30.0, -4e4)),
    spread=st.sampled_from((0.0, 1e-6, 1e-3, 1.0, 2e4)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**16),
)
def test_nothing_is_further_off_than_half_a_step(
    name: str, dim: int, shift: float, spread: float, dtype: torch.dtype, seed: int
) -> None:
    form, draw = FORMS[name], torch.Generator().manual_seed(seed)
    x = ((torch.rand(2, 16, dim, generator=draw) - 0.5) * spread + shift).to(dtype)
    x[:, :, 3] = shift  # a channel and a token that are constant
    x[:, 5] = shift / 2
    keys, values, coded = there_and_back(form, x, x)
    scales = coded.key_marks.float()[:, :1]
    many = groups(dim)
    by_token = coded.value_marks[:, 0].float().transpose(1, 2).repeat_interleave(dim // many, dim=2)
    for found, scale in ((keys, scales), (values, by_token)):
        off, scale = (found.cpu() - x.float()).abs(), scale.cpu()
        slack = 1e-6 * x.float().abs() + 1e-30  # of float32
        if form.floating:  # half a step of three binary places, or of the least float
            assert (off <= torch.maximum(x.float().abs() / 16, scale * 2.0**-10) + slack).all()
        else:
            assert (off <= scale / 2 + slack).all()
            assert (scale <= 1.01 * (spread + abs(shift) * 4) / form.reach + 1e-4 * abs(shift) + 1e-7).all()


@pytest.mark.parametrize("form", INTEGERS, ids=str)
def test_a_constant_is_closer_than_a_float16_comes(form: Format) -> None:
    for constant in (0.0, 1.0, -0.5, 1 / 3, 12345.678, -3e-5):
        x = torch.full((1, 16, 64), constant)
        keys, values, _ = there_and_back(form, x, x)
        torch.testing.assert_close(keys.cpu(), x, atol=4e-8, rtol=1e-5)
        torch.testing.assert_close(values.cpu(), x, atol=4e-8, rtol=1e-5)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf"), 1e6])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_numbers_that_no_scale_expresses_are_told_and_read_as_nan(name: str, odd: float) -> None:
    form = FORMS[name]
    if form.bits == 8 and odd == 1e6:
        odd = 1e9  # a scale of 2232 or 3922 is fine
    x = torch.ones(1, 16, 64)
    x[0, 2, 7] = odd
    coded, index = room(form, 1, 16, 64, 64), torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert not write_keys(coded, index, x.to(DEVICE))
    assert not write_values(coded, index, x.to(DEVICE))
    keys, values = read_keys(coded, index, torch.float32), read_values(coded, index, torch.float32)
    assert keys[0, :, 7].isnan().all()
    assert values[0, 2].isnan().all()
    assert keys[0, :, 8].isfinite().all()
    assert values[0, 3].isfinite().all()


def test_sizes_and_what_cannot_be_packed() -> None:
    assert [groups(n) for n in (64, 128, 192, 256, 288)] == [1, 1, 2, 2, 3]
    assert FORMS["int4"].page_bytes(128, 128, 64) == 64 * 128 + 4 * (128 + 64)
    assert FORMS["fp8"].page_bytes(128, 128, 64) == 64 * 256 + 2 * (128 + 64)
    assert FORMS["int2"].page_bytes(64, 256, 64) == 64 * 80 + 4 * (64 + 2 * 64)
    assert "key dim 6" in str(FORMS["int2"].unfit(6, 8))
    assert "value dim 6" in str(FORMS["int4"].unfit(8, 6))
    assert FORMS["int8"].unfit(7, 5) is None


# -- kernels -----------------------------------------------------------------------------------------------------


def coded_pages(form: Format, lengths: list[int], **kwargs: object) -> tuple[Paged, Paged]:
    """Rows in few bits, and the same rows as they read; every page that is not a row's older one is NaN."""
    dense = pages_of(lengths, **kwargs)  # type: ignore[arg-type]
    total, page, dim = dense.keys.shape
    value_dim = dense.values.shape[2]
    coded = room(form, total, page, dim, value_dim)
    tails = [torch.randn(len(lengths), page, d, device=DEVICE).to(dense.keys.dtype) for d in (dim, value_dim)]
    older = torch.cat([dense.table[row, : max(n - 1, 0) // page] for row, n in enumerate(lengths)]).long()
    write_keys(coded, older, dense.keys[older])
    write_values(coded, older, dense.values[older])
    keys, values = torch.full_like(dense.keys, NAN), torch.full_like(dense.values, NAN)
    keys[older], values[older] = (read(coded, older, keys.dtype) for read in (read_keys, read_values))
    for row, n in enumerate(lengths):
        if n:
            last = int(dense.table[row, (n - 1) // page])
            keys[last], values[last] = tails[0][row], tails[1][row]
    return replace(dense, keys=tails[0], values=tails[1], coded=coded), replace(dense, keys=keys, values=values)


def sound(paged: Paged) -> Paged:
    """The same where pages that nobody wrote read as numbers."""
    assert paged.coded is not None
    marks = {name: t.nan_to_num() for name, t in vars(paged.coded).items() if "_" in name}
    return replace(paged, coded=replace(paged.coded, **marks))


def triton_read(
    q: Tensor, paged: Paged, scale: float, programs: int = 0, even: bool = False, **sight: Any
) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton")
    from kvthrift.kernels.triton.read_coded import read

    rows, width = paged.table.shape
    queries = q.numel() // q.shape[-1] // rows
    plan = plan_read(rows, rows * width, queries, paged.values.shape[-1], q.device, programs=programs, even=even)
    first = read(q, paged, scale, plan, **sight)
    again = read(q, paged, scale, plan, **sight)
    assert not plan.arrived.any()
    torch.testing.assert_close(first, again, equal_nan=True)
    return first


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_the_naive_twin_reads_old_pages_and_new_ones(name: str, bias: bool) -> None:
    paged, plain = coded_pages(FORMS[name], [5, 33, 1, 16, 48, 0], bias=bias, dim=24, value_dim=8)
    paged = sound(paged)
    q = torch.randn(3, 4, 2, 24, device=DEVICE)
    found = naive.paged_attend(q, paged, scale=0.3)
    out, lse = row_by_row(q, plain, 0.3)
    torch.testing.assert_close(found.out.double(), out, atol=1e-5, rtol=1e-5)
    assert found.lse is not None
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize(
    ("lengths", "group", "queries", "dim", "value_dim", "bias"),
    [
        ([5, 33, 1, 16], 3, 1, 64, 64, False),
        ([0, 48], 1, 1, 80, 80, True),
        ([100, 1], 4, 2, 96, 32, False),
        ([17, 64, 65, 3], 16, 1, 64, 16, True),
        ([40, 90], 1, 16, 128, 128, False),
        ([1] * 4 + [50, 0] + [2], 1, 1, 32, 32, True),
    ],
)
@pytest.mark.parametrize("name", sorted(FORMS))
def test_triton_reads_what_the_rows_hold(
    name: str, lengths: list[int], group: int, queries: int, dim: int, value_dim: int, bias: bool, programs: int
) -> None:
    paged, plain = coded_pages(FORMS[name], lengths, dim=dim, value_dim=value_dim, bias=bias)
    q = torch.randn(1, len(lengths) * group, queries, dim, device=DEVICE)
    out, lse = row_by_row(q, plain, dim**-0.5)
    found, found_lse = triton_read(q, paged, dim**-0.5, programs)
    torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("length", "rows", "programs"), [(0, 2, 0), (1, 3, 2), (16, 3, 40), (50, 3, 4), (130, 1, 3)])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_triton_reads_rows_of_one_length(name: str, length: int, rows: int, programs: int) -> None:
    paged, plain = coded_pages(FORMS[name], [length] * rows, dim=64)
    q = torch.randn(1, rows * 2, 1, 64, device=DEVICE)
    found, found_lse = triton_read(q, paged, 0.25, programs, even=True)
    out, lse = row_by_row(q, plain, 0.25)
    torch.testing.assert_close(found.double(), out, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(found_lse.double(), lse, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_triton_reads_half_precision(name: str, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes in numpy, which has no bfloat16 products")
    paged, plain = coded_pages(FORMS[name], [130, 7, 64, 65], dim=128, page=64, dtype=dtype)
    q = torch.randn(1, 16, 1, 128, device=DEVICE).to(dtype)
    out, lse = row_by_row(q, plain, 0.125)
    found, found_lse = triton_read(q, paged, 0.125, 2)
    torch.testing.assert_close(found.double(), out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found_lse.double(), lse, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("value_dim", [40, 144, 256])
@pytest.mark.parametrize("kernel", ["naive", "triton"])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_append_writes_a_full_page_in_few_bits_and_then_the_entry(name: str, kernel: str, value_dim: int) -> None:
    form, lengths = FORMS[name], [0, 15, 16, 33, 48, 2]
    paged, _ = coded_pages(form, lengths, dim=24, value_dim=value_dim, room=1)
    assert paged.coded is not None
    tail_k, tail_v, length = paged.keys.clone(), paged.values.clone(), paged.lengths.clone()
    expected = replace(paged.coded, **{k: v.clone() for k, v in vars(paged.coded).items() if isinstance(v, Tensor)})
    for row in (2, 4):
        index = paged.table[row, lengths[row] // 16 - 1].long()[None]
        write_keys(expected, index, tail_k[row : row + 1])
        write_values(expected, index, tail_v[row : row + 1])
    k = torch.randn(2, 1, 3, 24, device=DEVICE).transpose(1, 2)
    v = torch.randn(2, 3, 1, value_dim, device=DEVICE)
    positions = torch.tensor([100, 7], device=DEVICE)
    if kernel == "triton":
        pytest.importorskip("triton")
        from kvthrift.kernels.triton.append_coded import append

        append(k, v, positions, paged)
    else:
        naive.paged_append(k, v, positions, paged)
    assert torch.equal(paged.lengths, length + 1)
    for row, n in enumerate(lengths):
        tail_k[row, n % 16], tail_v[row, n % 16] = k[row // 3, row % 3, 0], v[row // 3, row % 3, 0]
        assert paged.positions[paged.table[row, n // 16].long(), n % 16] == positions[row // 3]
    assert torch.equal(paged.keys, tail_k)
    assert torch.equal(paged.values, tail_v)
    for field, wanted in vars(expected).items():
        if isinstance(wanted, Tensor):
            found = getattr(paged.coded, field)
            off = (found != wanted) & ~(found.isnan() & wanted.isnan())
            carried = form.floating and field in ("keys", "values")  # the interpreter loses a carry now and then
            exact = kernel == "naive" or (DEVICE == "cpu" and not carried)
            assert off.float().mean() <= (0.0 if exact else 0.01)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("kernel", ["naive", "triton"])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_append_cannot_refuse_what_is_not_finite_but_shows_it(name: str, kernel: str) -> None:
    paged, _ = coded_pages(FORMS[name], [16, 16], dim=16, value_dim=16, room=1)
    paged.keys[0, 3, 5], paged.values[1, 3, 5] = float("inf"), float("nan")
    k = v = torch.zeros(1, 2, 1, 16, device=DEVICE)
    if kernel == "triton":
        pytest.importorskip("triton")
        from kvthrift.kernels.triton.append_coded import append

        append(k, v, torch.tensor([1], device=DEVICE), paged)
    else:
        naive.paged_append(k, v, torch.tensor([1], device=DEVICE), paged)
    assert paged.coded is not None
    written = paged.table[:, 0].long()
    keys, values = (read(paged.coded, written, torch.float32) for read in (read_keys, read_values))
    assert keys[0, :, 5].isnan().all()
    assert values[1, 3].isnan().all()
    assert keys.isnan().sum() == values.isnan().sum() == 16


def test_dispatch_answers_alike_wherever_it_goes() -> None:
    for form in FORMS.values():
        paged, plain = coded_pages(form, [20, 31], room=1)
        paged = sound(paged)
        k, v = torch.randn(2, 1, 1, 16, device=DEVICE), torch.randn(2, 1, 1, 16, device=DEVICE)
        for pages in (paged, replace(plain, lengths=plain.lengths.clone())):
            paged_append(k, v, torch.tensor([3, 4], device=DEVICE), pages)
        plain = replace(plain, lengths=paged.lengths)
        q = torch.randn(2, 4, 1, 16, device=DEVICE)
        found = paged_attend(q, paged, scale=0.25)
        torch.testing.assert_close(found.out.double(), row_by_row(q, plain, 0.25)[0], atol=1e-5, rtol=1e-5)


def test_dispatch_says_why_the_fast_kernels_do_not_fit() -> None:
    cuda = torch.device("cuda", 0)
    assert "cpu" in str(unfit(torch.device("cpu"), torch.bfloat16, 64, 64, 64, FORMS["int4"]))
    if torch.cuda.is_available():
        assert unfit(cuda, torch.bfloat16, 64, 64, 64, FORMS["int2"]) is None
        assert "float32" in str(unfit(cuda, torch.float32, 64, 64, 64, FORMS["int4"]))
        assert "129" in str(unfit(cuda, torch.bfloat16, 256, 129, 64, FORMS["int8"]))


def test_no_program_has_four_warps() -> None:
    """Their products were wrong where an operand is made in registers; :func:`_warps` says which."""
    from kvthrift.kernels.triton.read_coded import _warps

    assert {_warps(queries, dim) for queries in (1, 8, 16, 32, 64) for dim in (16, 64, 128, 256)} == {1, 2}
