"""How the programs of one row meet: the last few to arrive join its parts together.

A row is complete when the last program arrives. One program that joins the many parts of a long row alone would
keep all others waiting; so the last ``HELPERS`` to arrive join a slice of the channels each. Nobody has to wait: a
helper that has looked ``POLLS`` times gives its slice up, and the last to arrive joins it too. Where the programs run
one after another, it joins them all.

What a row's word counts: bit 31 is turned over when all have arrived (the first part's program adds what is missing, as
grid barriers do), so that nothing has to be set back; bits 8 to 30 count arrivals; the lowest 8 are slices given up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvthrift.kernels.triton.parts import join

NARROWEST = 16  # channels of a slice: 64 bytes of each part


@triton.jit
def settle(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, turn_ptr, program, row, first_part, last_part,
    QUERIES: tl.constexpr, HERE: tl.constexpr, QP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PARTS: tl.constexpr, HELPERS: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    """Say that this program's part of a row is there, and join what falls to it."""
    if HELPERS < 2:
        before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
        if before == last_part - first_part:
            tl.store(arrived_ptr + row, 0)
            join(
                out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, HERE, QP, DV, DVP, PARTS
            )  # fmt: skip
    else:
        FEW: tl.constexpr = PARTS if PARTS > HELPERS else HELPERS
        WIDTH: tl.constexpr = DVP // HELPERS
        others = last_part - first_part
        old, before = _arrive(turn_ptr + row, program == first_part, others)
        if others < FEW:
            if before == others:
                join(
                    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, HERE, QP, DV, DVP,
                    PARTS,
                )  # fmt: skip
        else:
            todo = _slices(turn_ptr + row, old, others - before, HELPERS, POLLS)
            for helper in range(HELPERS):
                if (todo >> helper) & 1 != 0:
                    join(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, row, first_part, last_part, QUERIES, HERE, QP, DV,
                        WIDTH, PARTS * HELPERS, helper * WIDTH,
                    )  # fmt: skip


@triton.jit
def _arrive(word_ptr, is_first, others):
    """Count a program in; the word as it was, and how many of the ``others`` were there before."""
    rest = 2147483647 - 256 * others + 1  # with all others' arrivals: bit 31 is turned over, and the count is nought
    old = tl.atomic_add(word_ptr, tl.where(is_first, rest, 256), sem="acq_rel")
    count = (old >> 8) & 0x7FFFFF
    return old, tl.where(count >= 0x400000, count - 0x800000 + others + 1, count)


@triton.jit
def _slices(word_ptr, old, behind, HELPERS: tl.constexpr, POLLS: tl.constexpr):
    """Bits of the slices that a program joins before which all but ``behind`` others arrived."""
    todo = 0
    if behind == 0:
        left = old & 255
        if left != 0:
            tl.atomic_add(word_ptr, -left, sem="relaxed")
        todo = left | 1
    elif behind < HELPERS:
        own = 1 << behind
        now = old
        looks = 0
        while ((now ^ old) >= 0) & (looks < POLLS):
            now = tl.atomic_add(word_ptr, 0, sem="acquire")
            looks += 1
        if (now ^ old) >= 0:
            now = tl.atomic_add(word_ptr, own, sem="acq_rel")
            if (now ^ old) < 0:  # all have arrived meanwhile, and nobody reads this any more
                tl.atomic_add(word_ptr, -own, sem="relaxed")
        todo = tl.where((now ^ old) < 0, own, 0)
    return todo
