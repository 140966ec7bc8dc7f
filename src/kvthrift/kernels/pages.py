"""Which pages a step reads: bounds on every page's keys, and the few pages whose entries may matter most.

Nothing is freed by this: every page stays, and a step reads the bounds and some pages instead of all pages (Quest,
2406.10774). Bounds cost as many bytes as two keys of the model's dtype a page; as ``1 / page`` of the keys and values
where both are as wide. In front of pages in few bits they are float32, since what such pages read as fits nothing less:
64 entries of 128 channels in int4 are 8960 bytes, and their bounds are 1024. Knows nothing of recipes or models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvthrift.errors import OptionError, UnknownNameError
from kvthrift.kernels import naive
from kvthrift.kernels.best import best
from kvthrift.kernels.codes import read_keys
from kvthrift.kernels.paged import Paged, _launching, _triton, unfit

Per = Literal["group", "query_head"]
Over = Literal["max", "sum"]

_AT_ONCE = 256  # pages that are looked at together


class PageBounds(NamedTuple):
    """The least and the largest number in each channel of each page's keys, both ``[P, Dk]``; 0 for unused pages."""

    low: Tensor
    high: Tensor


def page_bounds(paged: Paged) -> PageBounds:
    """Bounds of every page that a row lists; what lies behind a row's last entry is not looked at.

    Args:
        paged: pages may be shared by rows.

    Returns:
        ``low, high [P, Dk]`` in the dtype of the keys, float32 in front of pages in few bits; ``P`` as the pool has.
    """
    filled, coded = _filled(paged), paged.coded
    dtype = paged.keys.dtype if coded is None else torch.float32
    low = torch.zeros(len(filled), paged.keys.shape[-1], dtype=dtype, device=filled.device)
    high = torch.zeros_like(low)
    for part in torch.split(filled.nonzero()[:, 0], _AT_ONCE):
        keys = paged.keys[part] if coded is None else read_keys(coded, part, dtype)
        low[part], high[part] = _extremes(keys, filled[part])
    if coded is not None:
        rows = paged.lengths.nonzero()[:, 0]
        newest, page = _newest(paged)
        low[page[rows]], high[page[rows]] = _extremes(paged.keys[rows].to(dtype), newest[rows] % paged.page + 1)
    return PageBounds(low, high)


def update_bounds(bounds: PageBounds, paged: Paged, appended: int = 1) -> None:
    """Have the bounds say what ``page_bounds`` would, after entries were appended; nothing is asked of the host.

    Args:
        bounds: as they were before; changed in place.
        paged: every row has grown since by ``appended`` entries.
        appended: entries a row, at most a page.

    Raises:
        OptionError: more was appended than a page holds, or nothing.
    """
    if not 0 < appended <= paged.page:
        raise OptionError(f"appended={appended}: bounds follow 1 to {paged.page} entries; after more, make them anew.")
    if paged.coded is not None:
        _update_coded(bounds, paged, appended)
        return
    for back in range(appended - 1, -1, -1):
        newest, page = _newest(paged, back)
        key = paged.keys[page, newest % paged.page]
        first = (newest % paged.page == 0)[:, None]
        bounds.low[page] = torch.where(first, key, torch.minimum(bounds.low[page], key))
        bounds.high[page] = torch.where(first, key, torch.maximum(bounds.high[page], key))


def page_scores(q: Tensor, paged: Paged, bounds: PageBounds, *, per: Per = "group", over: Over = "max") -> Tensor:
    """The most that ``q.k`` can be for a key of each page: the sum over channels of ``max(q * low, q * high)``.

    Args:
        q: ``[B, HG, Q, Dk]``.
        paged: ``rows = B * H``.
        bounds: of its pages. Biases are not looked at.
        per: a number for every row, or for every query head.
        over: the largest over a row's (or query head's) queries, or their sum.

    Returns:
        ``[rows, width]`` or ``[B * HG, width]`` float32; ``-inf`` behind a row's last page.

    Raises:
        UnknownNameError: no such ``per`` or ``over``.
    """
    for what, given, valid in (("per", per, ("group", "query_head")), ("over", over, ("max", "sum"))):
        if given not in valid:
            raise UnknownNameError(what, given, valid)
    dim = q.shape[-1]
    if unfit(q.device, bounds.low.dtype, dim, dim, paged.page):
        return naive.page_scores(q, paged, bounds, per=per, over=over)
    with _launching(q.device):
        scores: Tensor = _triton("top_pages").page_scores(q, paged, bounds, per=per, over=over)
    return scores


def best_pages(
    q: Tensor, paged: Paged, bounds: PageBounds, count: int, *, per: Per = "group", over: Over = "max"
) -> Paged:
    """The pages that a step had better read: each row's newest, and those of the largest scores.

    Args:
        q: ``[B, HG, Q, Dk]``, the queries that will attend.
        paged: ``rows = B * H``.
        bounds: of its pages.
        count: pages a row at most, the newest among them (the newest two where ``Q > 1``, since queries may see their
            own entries only in part). Of equal pages the older stay.
        per: one choice for a KV head, or one for each query head. The latter makes ``rows = B * HG``; in front of pages
            in few bits it copies each row's last page for each of its query heads.
        over: see :func:`page_scores`.

    Returns:
        The same pages with narrower tables ``[rows, min(count, width)]`` and lengths, in the old order:
        :func:`~kvthrift.kernels.paged_attend` takes them as they are, with the same ``q``. For reading only; nothing
        can be appended. With ``count`` of at least every row's pages nothing is left out.

    Raises:
        OptionError: ``count`` does not hold the newest pages.
        UnknownNameError: no such ``per`` or ``over``.
    """
    always = 1 + -(-(q.shape[2] - 1) // paged.page)
    if count < always:
        raise OptionError(f"count={count} pages do not hold the newest {always}, which are always read.")
    scores = page_scores(q, paged, bounds, per=per, over=over)
    share = len(scores) // len(paged.lengths)
    table, lengths = (t.repeat_interleave(share, dim=0) for t in (paged.table, paged.lengths))
    owned = (lengths + paged.page - 1) // paged.page
    place = torch.arange(table.shape[1], device=table.device)
    settled = place >= (owned - always)[:, None]  # read anyway, or nobody's
    wanted = (owned - always).clamp(min=0, max=count - always)
    chosen = best(scores.masked_fill(settled, float("-inf")), wanted) | (settled & (place < owned[:, None]))
    width = min(count, table.shape[1])
    slot = torch.where(chosen, chosen.cumsum(1) - 1, width)  # what is not chosen goes to a column that is cut off
    narrow = table.new_zeros(len(table), width + 1).scatter_(1, slot, table)[:, :width].contiguous()
    fewer = (lengths - (owned - chosen.sum(1)) * paged.page).to(lengths.dtype)
    found = replace(paged, table=narrow, lengths=fewer)
    if paged.coded is None or share == 1:
        return found
    keys, values = (t.repeat_interleave(share, dim=0) for t in (paged.keys, paged.values))
    return replace(found, keys=keys, values=values)


def _filled(paged: Paged) -> Tensor:
    """``[P]`` entries in each page, as far as a row lists it."""
    held = paged.lengths[:, None] - torch.arange(paged.table.shape[1], device=paged.table.device) * paged.page
    held = held.clamp(min=0, max=paged.page).flatten().long()
    index = paged.table.long().clamp(min=0).flatten()
    return torch.zeros(len(paged.positions), dtype=torch.long, device=index.device).scatter_reduce_(
        0, index, held, "amax"
    )


def _newest(paged: Paged, back: int = 0) -> tuple[Tensor, Tensor]:
    """``[rows]`` place of each row's newest entry, or of one before it, and the page it lies in."""
    newest = (paged.lengths.long() - 1 - back).clamp(min=0)
    return newest, paged.table.long().gather(1, newest[:, None] // paged.page)[:, 0]


def _extremes(keys: Tensor, counts: Tensor) -> PageBounds:
    """Of the first ``counts [N]`` of keys ``[N, page, Dk]``, of which there is at least one."""
    absent = (torch.arange(keys.shape[1], device=keys.device) >= counts[:, None])[..., None]
    return PageBounds(keys.masked_fill(absent, float("inf")).amin(1), keys.masked_fill(absent, float("-inf")).amax(1))


def _update_coded(bounds: PageBounds, paged: Paged, appended: int) -> None:
    """A last page that has just begun left a page behind that reads otherwise now, being in few bits."""
    newest, page = _newest(paged)
    tail = _extremes(paged.keys.to(bounds.low.dtype), newest % paged.page + 1)
    before = paged.table.long().gather(1, (newest[:, None] // paged.page - 1).clamp(min=0))[:, 0]
    begun = (newest % paged.page < appended) & (newest >= paged.page)
    assert paged.coded is not None
    old = read_keys(paged.coded, before, bounds.low.dtype)
    where = torch.where(begun, before, page)
    for bound, mine, theirs in zip(bounds, tail, (old.amin(1), old.amax(1)), strict=True):
        bound[page] = mine
        bound[where] = torch.where(begun[:, None], theirs, mine)
