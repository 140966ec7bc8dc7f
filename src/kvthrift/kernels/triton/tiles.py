"""How large the blocks of a product are, so that they fit the 99 KiB that every GPU from 8.0 on has for a program."""

from __future__ import annotations

import torch
import triton

PRECISION = "tf32x3"  # float32 is multiplied in three parts; what is half as wide is multiplied as it is


def padded(dim: int) -> int:
    """Head dim as kernels see it."""
    return max(16, int(triton.next_power_of_2(dim)))


def tiles(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows of the block that stays, rows of those that pass by, and how many of the latter are on their way."""
    width = padded(dim) * dtype.itemsize * (2 if dtype == torch.float32 else 1)
    if width <= 512:
        return (128, 64, 3) if width <= 256 else (64, 32, 3)
    return (32, 16, 2) if width <= 1024 else (16, 16, 2)


def programs(device: torch.device) -> int:
    """Programs that fill the device."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
