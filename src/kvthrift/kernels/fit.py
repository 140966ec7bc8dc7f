"""Whether there are kernels for what is given; shared by everything that scores."""

from __future__ import annotations

from torch import Tensor

from kvthrift.kernels.paged import _launching, _triton, unfit

__all__ = ["dense", "fits", "launching", "load", "served"]

launching, load = _launching, _triton


def fits(*given: Tensor) -> bool:
    """Whether Triton's kernels take such vectors ``[..., D]``, none of them empty, all of one dtype."""
    first = given[0]
    alike = all(x.dtype == first.dtype and x.numel() > 0 for x in given)
    return alike and unfit(first.device, first.dtype, first.shape[-1], first.shape[-1], 64) is None


def served(x: Tensor) -> bool:
    """Whether there are kernels for such numbers, of which there are some."""
    return x.numel() > 0 and unfit(x.device, x.dtype, 16, 16, 64) is None


def dense(x: Tensor) -> Tensor:
    """With neighbours of the last dim side by side; the other dims may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
