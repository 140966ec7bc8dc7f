"""What undoes the rotation of vLLM's caches in 4 bits by token: learnt from vLLM itself. Imported only inside vLLM."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from kvthrift.errors import UnsupportedModelError


@cache
def rotation_back(dim: int, device: torch.device) -> Tensor:
    """``[D, D]`` float32 by which numbers as they are stored ``[n, D]`` are multiplied to have them as they were.

    vLLM turns keys, values and queries alike, so that attention needs keys as they were no more than values; scores do.

    Args:
        dim: D, numbers of a key.
        device: where it is wanted.

    Raises:
        UnsupportedModelError: what vLLM does is no rotation.
    """
    there, back = (
        single_rht(torch.eye(dim, dtype=torch.float32, device=device), inverse=inverse).round()
        for inverse in (False, True)
    )  # whole numbers, but for the 16 bits that a GPU computes them in
    size = back[0].abs().sum()
    if not torch.equal(there @ back, size * torch.eye(dim, device=device)):
        raise UnsupportedModelError(
            f"this vLLM does not rotate heads of {dim} numbers in its caches of 4 bits as it is known to. Start with "
            "--kv-cache-dtype int8_per_token_head, or leave kvthrift out of --additional-config."
        )
    return back / size
