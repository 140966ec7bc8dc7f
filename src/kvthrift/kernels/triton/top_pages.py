"""What each page's keys can come to for the queries of a row: two small products with the page's bounds.

``max(q * low, q * high)`` is ``max(q, 0) * high + min(q, 0) * low``, so that a channel needs no comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvthrift.kernels.triton.tiles import PRECISION, padded

if TYPE_CHECKING:
    from kvthrift.kernels.paged import Paged
    from kvthrift.kernels.pages import PageBounds

_PAGES = 32  # of one program
_MANY = 32  # queries of one product, at most


@triton.jit
def _page_scores(
    q_ptr, low_ptr, high_ptr, table_ptr, length_ptr, out_ptr, width,
    QUERIES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
    JOINED: tl.constexpr, SUMMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    m, d = tl.arange(0, M), tl.arange(0, DP)
    pages = (tl.load(length_ptr + row) + PAGE - 1) // PAGE
    there, in_d = n < tl.minimum(pages, width), d < D
    page = tl.load(table_ptr + row * width + n, mask=there, other=0).to(tl.int64)
    at = page[:, None] * D + d[None, :]
    low = tl.load(low_ptr + at, mask=there[:, None] & in_d[None, :], other=0.0)
    high = tl.load(high_ptr + at, mask=there[:, None] & in_d[None, :], other=0.0)
    total = tl.zeros([N], tl.float32) if SUMMED else tl.full([N], float("-inf"), tl.float32)
    for first in tl.static_range(0, QUERIES, M):
        inside = first + m < QUERIES
        q = tl.load(
            q_ptr + (row * QUERIES + first + m)[None, :] * D + d[:, None], mask=inside[None, :] & in_d[:, None],
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        scores = tl.dot(high, tl.maximum(q, 0.0).to(high.dtype), input_precision=PRECISION)
        scores = tl.dot(low, tl.minimum(q, 0.0).to(low.dtype), scores, input_precision=PRECISION)
        if SUMMED:
            total += tl.sum(scores, 1)  # a query that is none adds nothing
        elif JOINED:
            total = tl.maximum(total, tl.max(tl.where(inside[None, :], scores, float("-inf")), 1))
        else:
            tl.store(
                out_ptr + (row * QUERIES + first + m)[None, :].to(tl.int64) * width + n[:, None],
                tl.where(there[:, None], scores, float("-inf")), mask=inside[None, :] & (n < width)[:, None],
            )  # fmt: skip
    if JOINED:
        tl.store(out_ptr + row.to(tl.int64) * width + n, tl.where(there, total, float("-inf")), mask=n < width)


def page_scores(q: Tensor, paged: Paged, bounds: PageBounds, *, per: str, over: str) -> Tensor:
    """See :func:`kvthrift.kernels.pages.page_scores`."""
    rows, width = paged.table.shape
    steps, dim = q.shape[2:]
    queries = q.numel() // (rows * dim)
    joined = per == "group"
    out = torch.empty(rows * (1 if joined else queries), width, dtype=torch.float32, device=q.device)
    _page_scores[(rows, triton.cdiv(width, _PAGES))](
        q.contiguous(), bounds.low, bounds.high, paged.table, paged.lengths, out, width,
        QUERIES=queries, M=min(_MANY, padded(queries)), D=dim, DP=padded(dim), PAGE=paged.page, N=_PAGES,
        JOINED=joined, SUMMED=joined and over == "sum", PRECISION=PRECISION,
    )  # fmt: skip
    if joined or steps == 1:
        return out
    by_head = out.view(-1, steps, width)
    return by_head.sum(1) if over == "sum" else by_head.amax(1)
