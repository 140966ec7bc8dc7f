"""Pages in few bits where the state machine has no eye: rounding, refusals, sizes, what forks see of a full tail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvthrift.codec import Float8, Integer2, Integer4, Integer8
from kvthrift.core import LayerShape
from kvthrift.errors import CacheStateError, RecipeError
from kvthrift.kernels.codes import Format
from kvthrift.store import LayerStore, entry_and_head_bytes
from kvthrift.store.saved import flat, refill

PAGE, HEADS, DIM = 16, 2, 32
FORMS = [kind.format for kind in (Integer8, Integer4, Integer2, Float8)]
INT4 = Integer4.format


def store(length: int, form: Format | None = INT4, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> LayerStore:
    made = LayerStore(LayerShape(HEADS, HEADS, DIM, DIM), batch, dtype, torch.device("cpu"), page=PAGE, form=form)
    if length:
        extend(made, length)
    return made


def extend(made: LayerStore, count: int, value: float | None = None) -> torch.Tensor:
    block = torch.randn(made.batch, HEADS, count, DIM) if value is None else torch.full((1, HEADS, count, DIM), value)
    made.append(block.to(made.dtype), -block.to(made.dtype), made.longest + torch.arange(count).expand(made.batch, -1))
    return block


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_newest_page_is_as_it_came_and_older_ones_nearly(form: Format) -> None:
    made = store(0, form)
    blocks = [extend(made, count) for count in (33, 1, 14, 1, 1, 15)]
    given, view = torch.cat(blocks, dim=2), made.read()
    assert made.longest == 65
    assert torch.equal(view.keys[:, :, 64:], given[:, :, 64:])
    assert torch.equal(view.values[:, :, 64:], -given[:, :, 64:])
    off = (view.keys - given).abs()[:, :, :64].unflatten(2, (4, PAGE)).amax(dim=3)  # of each channel of each page
    span = given[:, :, :64].unflatten(2, (4, PAGE))
    span = span.amax(dim=3) - span.amin(dim=3)
    assert (off > 0).any()
    assert (off <= span * (1 / 16 if form.floating else 0.502 / (2**form.bits - 1))).all()
    off, span = (view.values + given).abs()[:, :, :64].amax(dim=-1), given[:, :, :64]
    span = span.amax(dim=-1) - span.amin(dim=-1)
    assert (off <= span * (1 / 16 if form.floating else 0.502 / (2**form.bits - 1))).all()


def test_a_full_page_stays_as_it_came_until_the_next_entry() -> None:
    made = store(0)
    given = extend(made, PAGE)
    assert torch.equal(made.read().keys, given)
    extend(made, 1)
    assert not torch.equal(made.read().keys[:, :, :PAGE], given)


def test_one_by_one_or_all_at_once_is_the_same() -> None:
    block = torch.randn(1, HEADS, 70, DIM)
    at_once, one_by_one = store(0), store(0)
    at_once.append(block, block, torch.arange(70)[None])
    for i in range(70):
        one_by_one.append(block[:, :, i : i + 1], block[:, :, i : i + 1], torch.tensor([[i]]))
    assert torch.equal(at_once.read().keys, one_by_one.read().keys)
    assert torch.equal(at_once.read().values, one_by_one.read().values)


def test_going_back_into_an_older_page_keeps_what_it_read_as() -> None:
    made = store(40)
    before = made.read()
    fork = made.fork()
    made.rewind(torch.tensor([20]))
    assert torch.equal(made.read().keys, before.keys[:, :, :20])
    assert torch.equal(made.read().values, before.values[:, :, :20])
    new = extend(made, 1)
    assert torch.equal(made.read().keys[:, :, 20:], new)  # and what is added there is as it came
    extend(made, 30)
    assert torch.equal(fork.read().keys, before.keys)
    made.check_integrity(fork)


def test_a_full_tail_is_not_written_into_a_page_that_a_fork_reads() -> None:
    """Going back by one makes a page that is shared, and in few bits already, the tail again."""
    made = store(PAGE + 1, Integer2.format)
    fork = made.fork()
    before = made.read()
    fork.rewind(torch.tensor([PAGE]))
    assert fork.tail is not None
    fork.tail.keys.add_(1)  # rounded again it would hardly differ
    fork.tail.values.add_(1)
    extend(fork, 1)
    assert torch.equal(made.read().keys, before.keys)
    assert torch.equal(made.read().values, before.values)
    made.check_integrity(fork)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("count", [1, PAGE + 1])
def test_what_cannot_be_expressed_is_refused(odd: float, count: int) -> None:
    made = store(PAGE)
    assert made.tail is not None
    made.tail.keys[0, 3, 5] = odd
    with pytest.raises(CacheStateError, match=r"float16 scale.*int4"):
        extend(made, count)


@pytest.mark.parametrize(("dims", "what"), [((6, 8), "key dim 6"), ((8, 6), "value dim 6")])
def test_dims_that_do_not_fill_bytes_are_refused(dims: tuple[int, int], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        LayerStore(LayerShape(1, 1, *dims), 1, torch.float32, torch.device("cpu"), form=Integer2.format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_bytes_are_counted_to_the_last(form: Format, dtype: torch.dtype) -> None:
    """Four whole pages a head: payload, scales, middles, positions; the tail; the table."""
    flat_keys = torch.randn(HEADS * 4 * PAGE, DIM).to(dtype)
    made = store(0, form, dtype=dtype)
    lengths = np.full((1, HEADS), 4 * PAGE)
    made.replace(flat_keys, flat_keys, torch.arange(4 * PAGE).repeat(HEADS), lengths, form=form)
    numbers = HEADS * 4 * PAGE * 2 * DIM
    marks = HEADS * 4 * (DIM + PAGE) * 2 * (1 if form.floating else 2)
    tail = HEADS * PAGE * 2 * DIM * dtype.itemsize
    rest = HEADS * 4 * (4 * PAGE + 4)
    assert made.bytes == numbers * form.bits // 8 + marks + tail + rest
    assert made.payload == numbers * form.bits // 8 + tail
    entry, head = entry_and_head_bytes(made.shape, dtype, PAGE, form)
    assert made.bytes - rest <= HEADS * (4 * PAGE * entry + head) <= made.bytes - rest + HEADS * 4 * PAGE
    assert made.read_bytes == (numbers * form.bits // 8 + marks) * 3 // 4 + tail


def test_forms_can_be_changed_and_nothing_else_changes() -> None:
    made = store(50, None)
    given, positions = made.read(), made.positions()
    made.rewrite(INT4)
    assert made.form is INT4
    assert torch.equal(made.positions(), positions)
    assert torch.equal(made.read().keys[:, :, 48:], given.keys[:, :, 48:])
    rounded = made.read()
    made.rewrite(None)
    assert torch.equal(made.read().keys, rounded.keys)
    assert made.tail is None


@pytest.mark.parametrize("form", [None, *FORMS], ids=str)
def test_flat_tensors_are_the_store_bit_for_bit(form: Format | None) -> None:
    made = store(0, form, batch=2)
    lengths = np.array([[50, 3], [0, 17]])
    keys, values = torch.randn(70, DIM), torch.randn(70, DIM)
    positions = torch.cat([torch.arange(n) for n in lengths.flat])
    made.replace(keys, values, positions, lengths, planes={"bias": torch.randn(70)}, form=form)
    other = store(0, None, batch=2)
    refill(other, flat(made), form)
    assert np.array_equal(other.lengths, lengths)
    valid = made.valid()
    for field in ("keys", "values"):
        mine, theirs = getattr(made.read(), field), getattr(other.read(), field)
        assert torch.equal(mine[valid], theirs[valid])
    assert torch.equal(made.plane("bias")[valid], other.plane("bias")[valid])
    one = torch.randn(2, HEADS, 1, DIM)
    for each in (made, other):
        for step in range(20):
            each.append(one, one, torch.full((2, 1), 60 + step))
    valid = made.valid()
    assert torch.equal(made.read().keys[valid], other.read().keys[valid])
    other.check_integrity()


def test_saved_pages_of_another_form_are_refused() -> None:
    saved = flat(store(40, INT4))
    with pytest.raises(CacheStateError, match="fp8"):
        refill(store(0, None), saved, Float8.format)
    with pytest.raises(CacheStateError, match="int2"):
        refill(store(0, None), saved, Integer2.format)
    fewer = {name: t[:1] if name.startswith("codes.") else t for name, t in saved.items()}
    with pytest.raises(CacheStateError, match="1 pages were saved"):
        refill(store(0, None), fewer, INT4)
