"""Products of a few rows with several matrices of one input: ``x W_j^T + b_j`` in one launch, also in compiled graphs.

What a decode step of a few sequences takes is the time that its weights take to be read. A library's product of few
rows leaves a part of that time, once a product; here several share a launch, and no weight is copied or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kvthrift.errors import OptionError
from kvthrift.kernels.fit import launching, load
from kvthrift.kernels.paged import unfit

MOST = 4  # matrices of one launch
MOST_ROWS = 64  # as many are computed always: fewer would take Hopper's tensor cores longer
_STEP = 16  # inner sizes are multiples of it, so that loads are 16 bytes wide
_WORTH = {128: 1.0, 64: 0.9, 32: 0.75}  # the narrower a tile, the more often the input is read again
_ROOM = 128 * 2**10  # bytes of shared memory
_MOST_STAGES = 8


@dataclass(frozen=True)
class Setting:
    """How one launch is cut; zeros are chosen by :func:`setting_of`.

    Attributes:
        columns: output columns of a tile: 32, 64, 128 or 256.
        depth: of a step along the inner size: 32, 64 or 128.
        stages: steps on the way at once.
        warps: 4 or 8.
        run: neighbouring tiles that a program takes, one after another.
    """

    columns: int = 0
    depth: int = 0
    stages: int = 0
    warps: int = 0
    run: int = 0


@dataclass(frozen=True)
class Device:
    """What a GPU has: multiprocessors, and bytes of shared memory that a program may take."""

    multiprocessors: int
    room: int


def unfit_for(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why the kernel does not take these, on whatever GPU; None if it does. Looks at no numbers."""
    if not 1 <= len(weights) <= MOST:
        return f"{len(weights)} matrices, where 1 to {MOST} go together"
    if x.dim() != 2 or not 1 <= x.shape[0] <= MOST_ROWS:
        return f"an input of shape {list(x.shape)}, where [1 to {MOST_ROWS}, K] is taken"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"numbers in {x.dtype}, where bfloat16 and float16 are taken"
    if x.shape[1] % _STEP or x.shape[1] < 2 * _STEP:
        return f"an inner size of {x.shape[1]}, where multiples of {_STEP} from {2 * _STEP} on are taken"
    for w in weights:
        if w.dtype != x.dtype or w.device != x.device:
            return f"a matrix in {w.dtype} on {w.device}, where the input is in {x.dtype} on {x.device}"
        if w.dim() != 2 or w.shape[1] != x.shape[1] or len(w) == 0 or not w.is_contiguous():
            return f"a matrix {list(w.shape)} with strides {list(w.stride())}, where [N, {x.shape[1]}] in one piece is"
    return None


def naive_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The twin: one product after another."""
    return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


@torch.library.custom_op(
    "kvthrift::linears", mutates_args=(), schema="(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]"
)
def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """``[M, N_j]`` for every matrix, summed in float32: the same bits each time.

    Where there is no kernel for these (see :func:`unfit_for`), one product after another.

    Args:
        x: ``[M, K]``.
        weights: ``[N_j, K]`` each.
        biases: ``[N_j]`` or None each.
    """
    if unfit_for(x, weights) is None and unfit(x.device, x.dtype, 16, 16, 64) is None:
        return launched(x, weights, biases)
    return naive_linears(x, weights, biases)


@linears.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weights]


def launched(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], setting: Setting | None = None
) -> list[Tensor]:
    """See :func:`linears`; by the kernel, wherever Triton runs it.

    Args:
        setting: for measuring; what is not given in it is chosen.

    Raises:
        OptionError: a bias that does not fit.
    """
    for w, b in zip(weights, biases, strict=True):
        if b is not None and (tuple(b.shape) != (len(w),) or b.dtype != x.dtype):
            raise OptionError(
                f"a bias {list(b.shape)} in {b.dtype} for {len(w)} columns in {x.dtype}: give one of each."
            )
    biases = [None if b is None else b.contiguous() for b in biases]
    x = x if x.stride(1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()
    sizes = tuple(len(w) for w in weights)
    chosen = setting_of(x.shape[1], sizes, _device(x.device), setting or Setting())
    with launching(x.device):
        made: list[Tensor] = load("linears").linears(x, weights, biases, chosen)
    return made


def tiles_of(sizes: Sequence[int], columns: int) -> int:
    """Tiles of all matrices."""
    return sum(-(-size // columns) for size in sizes)


@cache
def setting_of(depth: int, sizes: tuple[int, ...], device: Device, asked: Setting) -> Setting:
    """How a launch is cut: every program takes whole tiles, and no more of them than any other has to.

    The widest tile of up to 128 columns that keeps about as many multiprocessors busy as a narrower one would; as many
    steps on the way as fill a little more than half of a large GPU's shared memory.
    """
    cores = device.multiprocessors
    columns = asked.columns or max(_WORTH, key=lambda wide: _WORTH[wide] * _busy(sizes, wide, cores))
    step = min(asked.depth or (128 if columns <= 64 else 64), 1 << (depth - 1).bit_length())
    loaded = (columns + MOST_ROWS) * step * 2  # bytes of a step
    stages = asked.stages or max(2, min(_MOST_STAGES, min(_ROOM, device.room) // loaded))
    return Setting(columns, step, stages, asked.warps or 4, asked.run or -(-tiles_of(sizes, columns) // cores))


def _busy(sizes: Sequence[int], columns: int, cores: int) -> float:
    """The share of multiprocessors that do what is asked for, while the longest run takes its time."""
    return sum(sizes) / (columns * cores * -(-tiles_of(sizes, columns) // cores))


@cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(4, _ROOM)
    about = torch.cuda.get_device_properties(device)
    return Device(about.multi_processor_count, getattr(about, "shared_memory_per_block_optin", 99 * 2**10))
