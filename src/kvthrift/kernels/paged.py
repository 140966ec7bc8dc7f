"""Reading and writing pages where they lie: one decode step for heads of any lengths, without a gather or padding.

The dispatch point of everything that works on pages. Triton's kernels (``triton/``) where there is a GPU for them, the
naive twins elsewhere; the two take the same arguments. Lengths and tables are tensors on the device, so that a step
needs nothing from the host and can be part of a CUDA graph. Knows nothing of recipes or models.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvthrift.core import AttentionOutput
from kvthrift.errors import OptionError
from kvthrift.kernels import naive
from kvthrift.kernels.codes import Coded, Format, groups
from kvthrift.kernels.plan import ReadPlan

_LARGEST_DIM = 256


@dataclass(frozen=True)
class Paged:
    """Entries of many heads in pages; a row is one KV head of one sequence, sequences first.

    Where pages are in few bits (``coded``), each row's last page is not: it is ``keys[row], values[row]``.

    Attributes:
        keys, values: ``[P, page, Dk]``, ``[P, page, Dv]``; ``[rows, page, ...]`` in front of pages in few bits.
        positions: ``[P, page]`` int32 true positions.
        table: ``[rows, width]`` int32 page numbers; a row's first ``ceil(length / page)`` are its own.
        lengths: ``[rows]`` int32 entries.
        bias: ``[P, page]`` float32 added to logits, or None.
        coded: the pages of keys and values in few bits, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor
    bias: Tensor | None = None
    coded: Coded | None = None

    @property
    def form(self) -> Format | None:
        """How full pages are written; None for as they came."""
        return None if self.coded is None else self.coded.format

    @property
    def page(self) -> int:
        """Entries a page."""
        return self.keys.shape[1]


def unfit(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, page: int, form: Format | None = None
) -> str | None:
    """Why the fast kernels cannot be used for such pages; None if they can."""
    if device.type != "cuda":
        return f"pages are on {device.type}, not on a CUDA device"
    if not _has_triton():
        return "Triton is not installed"
    major, minor = _capability(device.index)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, below 8.0"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"pages hold {dtype}"
    if max(key_dim, value_dim) > _LARGEST_DIM:
        return f"head dim {max(key_dim, value_dim)} is above {_LARGEST_DIM}"
    if page < 16 or page & (page - 1):
        return f"pages of {page} entries: a power of two from 16 on is needed"
    return None if form is None else _unfit_coded(form, dtype, value_dim, (major, minor))


def _unfit_coded(form: Format, dtype: torch.dtype, value_dim: int, capability: tuple[int, int]) -> str | None:
    if form.floating and capability < (8, 9):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and {form.name} needs 8.9"
    if dtype == torch.float32:
        return f"{form.name} is read in half precision, and the model computes in float32"
    if groups(value_dim) > 2:
        return f"values of {value_dim} channels have {groups(value_dim)} scales a token"
    return None


def paged_attend(
    q: Tensor,
    paged: Paged,
    *,
    scale: float,
    plan: ReadPlan | None = None,
    causal: bool = False,
    window: int | None = None,
    positions: Tensor | None = None,
    cap: float | None = None,
) -> AttentionOutput:
    """Attention of a few queries over the entries of their rows, all of them past unless said otherwise.

    A logit is ``scale * q.k``, then capped, then the entry's bias is added.

    Args:
        q: ``[B, HG, Q, Dk]`` in the dtype of the pages.
        paged: ``rows = B * H``.
        scale: factor on the logits.
        plan: from :func:`~kvthrift.kernels.plan.plan_read` for as many rows and queries; made here if None.
        causal: the last Q entries of every row are the queries' own: query ``i`` of Q sees the first
            ``length - Q + i + 1`` entries.
        window: entries at ``position - window`` of a query, or before, get no weight; their pages are read though.
        positions: ``[B, Q]`` integers, the queries' true positions; a window needs them.
        cap: logits become ``cap * tanh(logits / cap)``, as in Gemma 2 (2408.00118).

    Returns:
        ``out [B, HG, Q, Dv]`` and ``lse [B, HG, Q]`` float32; a query that sees no entry gets 0 and ``-inf``.

    Raises:
        OptionError: a window or cap is not above 0, or a window comes without fitting positions.
    """
    _check_sight(q, window, positions, cap)
    sight: dict[str, Any] = {"causal": causal, "window": window, "positions": positions, "cap": cap}
    if unfit(q.device, paged.keys.dtype, q.shape[-1], paged.values.shape[-1], paged.page, paged.form):
        return naive.paged_attend(q, paged, scale=scale, **sight)
    with _launching(q.device):
        if not causal and window is None and cap is None and _for_a_warp(q, paged):
            return AttentionOutput(*_triton("read_int4").read(q, paged, scale, plan))
        read = _triton("read" if paged.coded is None else "read_coded").read
        return AttentionOutput(*read(q, paged, scale, plan, **sight))


def _for_a_warp(q: Tensor, paged: Paged) -> bool:
    """Whether pages are as ``triton/read_int4.py`` takes them, and so few queries that a warp does."""
    form = paged.form
    if form is None or form.bits != 4 or paged.bias is not None or q.element_size() != 2:
        return False
    shape = (q.shape[-1], paged.values.shape[-1], paged.page)
    queries = q.shape[0] * q.shape[1] * q.shape[2] // max(len(paged.table), 1)
    return shape == (128, 128, 64) and queries <= 8 and _has_gluon()


def _check_sight(q: Tensor, window: int | None, positions: Tensor | None, cap: float | None) -> None:
    if cap is not None and not 0 < cap < float("inf"):
        raise OptionError(f"cap={cap} bends no logits: it has to be above 0 and finite. Pass None for none.")
    if window is None:
        return
    if window < 1:
        raise OptionError(f"window={window} hides every entry: it has to be at least 1. Pass None for none.")
    wanted = (q.shape[0], q.shape[2])
    if positions is None or tuple(positions.shape) != wanted:
        given = "no positions" if positions is None else f"positions of shape {tuple(positions.shape)}"
        raise OptionError(f"window={window} came with {given}: true positions {wanted} of the queries are needed.")


def paged_append(k: Tensor, v: Tensor, positions: Tensor, paged: Paged) -> None:
    """Write entries behind those of every row, one after the other, and count them, on the device alone.

    In front of pages in few bits, a last page that is full is written in few bits first. A number that is not finite
    cannot be refused there: its group reads as NaN.

    Args:
        k, v: ``[B, H, Q, Dk]``, ``[B, H, Q, Dv]``.
        positions: ``[B, Q]`` integers, or ``[B]`` where Q is 1.
        paged: every row's table must have room; ``lengths`` grows by Q.
    """
    if positions.ndim == 2:
        for one_k, one_v, at in zip(torch.split(k, 1, 2), torch.split(v, 1, 2), positions.unbind(1), strict=True):
            paged_append(one_k, one_v, at, paged)
    elif unfit(k.device, paged.keys.dtype, k.shape[-1], v.shape[-1], paged.page, paged.form):
        naive.paged_append(k, v, positions, paged)
    else:
        with _launching(k.device):
            _triton("append" if paged.coded is None else "append_coded").append(k, v, positions, paged)


def _launching(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments lie on."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _has_gluon() -> bool:
    """Whether this Triton has the parts of its lower language that are used; it is younger, and still moves."""
    try:
        _triton("read_int4")
    except (ImportError, AttributeError):
        return False
    return True


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _triton(name: str) -> Any:
    return import_module(f"kvthrift.kernels.triton.{name}")
