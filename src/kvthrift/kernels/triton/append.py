"""One new entry for every row, lengths counted on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.parts import await_others, launch

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged


@triton.jit
def _append(
    new_k_ptr, new_v_ptr, new_position_ptr, k_ptr, v_ptr, position_ptr, table_ptr, length_ptr,
    k_stride, v_stride, position_stride, width,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    await_others(EARLY)
    row = tl.program_id(0)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    k = tl.load(new_k_ptr + row * k_stride + d, mask=d < D)
    v = tl.load(new_v_ptr + row * v_stride + dv, mask=dv < DV)
    position = tl.load(new_position_ptr + (row // HEADS) * position_stride)
    length = tl.load(length_ptr + row)
    page = tl.load(table_ptr + row * width + length // PAGE).to(tl.int64)
    slot = page * PAGE + length % PAGE
    tl.store(k_ptr + slot * D + d, k, mask=d < D)
    tl.store(v_ptr + slot * DV + dv, v, mask=dv < DV)
    tl.store(position_ptr + slot, position.to(tl.int32))
    tl.store(length_ptr + row, length + 1)


def append(k: Tensor, v: Tensor, positions: Tensor, paged: Paged) -> None:
    """See :func:`kvthrift.kernels.paged.paged_append`."""
    rows, width = paged.table.shape
    dim, value_dim = k.shape[-1], v.shape[-1]
    k, v = k.reshape(rows, dim), v.reshape(rows, value_dim)
    if k.stride(1) != 1:
        k = k.contiguous()
    if v.stride(1) != 1:
        v = v.contiguous()
    _append[(rows,)](
        k, v, positions, paged.keys, paged.values, paged.positions, paged.table, paged.lengths,
        k.stride(0), v.stride(0), positions.stride(0), width,
        HEADS=rows // positions.shape[0], D=dim, DP=triton.next_power_of_2(dim),
        DV=value_dim, DVP=triton.next_power_of_2(value_dim), PAGE=paged.page, num_warps=1, **launch(k.device),
    )  # fmt: skip
