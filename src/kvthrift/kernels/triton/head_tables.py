"""Tables of heads of unequal lengths: one program a head of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kvthrift.kernels.head_tables import Kept


@triton.jit
def _fill(
    page_ptr, start_ptr, full_ptr, slot_ptr, length_ptr, block_ptr, table_ptr, size_ptr,
    page_stride, start_stride, block_stride, table_stride, step,
    HEADS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    length = tl.load(length_ptr + row)
    full = tl.load(full_ptr + slot)
    first = tl.load(start_ptr + slot * start_stride + head)
    count = tl.load(start_ptr + slot * start_stride + head + 1) - first
    entries = tl.where(length > 0, (count - full) * SIZE + length, 0)
    tl.store(size_ptr + row * HEADS + head, entries)
    pages = (entries + SIZE - 1) // SIZE
    target = table_ptr + (row * HEADS + head).to(tl.int64) * table_stride
    column = tl.arange(0, COLUMNS)
    for begin in range(0, pages, COLUMNS):
        c = begin + column
        kept = tl.load(page_ptr + slot * page_stride + first + c, mask=(c < count) & (c < pages), other=0)
        block = tl.load(
            block_ptr + row.to(tl.int64) * block_stride + full + c - count, mask=(c >= count) & (c < pages), other=0
        )  # fmt: skip
        tl.store(target + c, tl.where(c < count, kept, block * step + head), mask=c < pages)


def fill(kept: Kept, slots: Tensor, lengths: Tensor, blocks: Tensor, tables: Tensor, sizes: Tensor) -> None:
    """See :func:`kvthrift.kernels.head_tables.head_tables`."""
    _fill[(len(slots), kept.heads)](
        kept.pages, kept.starts, kept.full, slots, lengths, blocks, tables, sizes,
        kept.pages.stride(0), kept.starts.stride(0), blocks.stride(0), tables.stride(0), kept.step,
        HEADS=kept.heads, SIZE=kept.size, COLUMNS=256, num_warps=4,
    )  # fmt: skip
