"""How a server writes numbers in its cache. Whole cells are moved as they are; only scores need to know what they say.

Knows no vLLM class: names of dtypes are vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvthrift.errors import UnsupportedModelError

_PLAIN = ("auto", "bfloat16", "float16", "float32")
SERVED = {  # by vLLM's name of the device
    "cpu": (*_PLAIN, "fp8", "fp8_e4m3", "fp8_e5m2"),
    "cuda": (*_PLAIN, "fp8", "fp8_e4m3", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head"),
}
ROTATED = "int4_per_token_head"  # each key and value is rotated before it is written; two numbers lie in a byte
_UNSERVED = {  # by how a name begins
    "fp8_e5m2": "not tested on GPUs",
    "turboquant": "a backend of its own; a key's cell is another than a value's, and some layers are left in 16 bits",
    "ultraquant": "a backend of its own; keys are rotated and values are not, with scales of 32 numbers",
    "nvfp4": "FlashInfer's on Blackwell; scales of 16 numbers lie apart, so that a token is no cell that can be moved",
}
_KINDS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_per_token_head": torch.float8_e4m3fn,
    "int8_per_token_head": torch.int8,
    ROTATED: torch.uint8,
}
_SCALE = 4  # bytes of a float32 behind the numbers of a token, where each has its own scale


@dataclass(frozen=True)
class Cells:
    """One layer's way of writing keys and values.

    Attributes:
        kind: of what is written in a byte; None for numbers as they are.
        keys, values: what those of the whole layer are multiplied by; None where each token of a head has its own
            float32, behind its numbers.
        dtype: of numbers as they are read.
        back: ``[D, D]``, what undoes the rotation of numbers in 4 bits, two in a byte, the former in its low bits. The
            code that stands for 0 is the last four bits of the token's scale.
    """

    kind: torch.dtype | None = None
    keys: Tensor | float | None = None
    values: Tensor | float | None = None
    dtype: torch.dtype = torch.bfloat16
    back: Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether each token of a head has a scale of its own."""
        return self.kind is not None and self.keys is None

    def numbers(self, width: int) -> int:
        """Numbers of a key in a cell of ``width``."""
        bytes_ = width - _SCALE if self.apart else width
        return bytes_ if self.back is None else 2 * bytes_

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, D]`` that cells ``[n, C]`` say."""
        return self._said(keys, self.keys), self._said(values, self.values)

    def _said(self, cells: Tensor, scale: Tensor | float | None) -> Tensor:
        if self.kind is None:
            return cells
        if scale is None:
            behind = cells[:, -_SCALE:].contiguous()
            cells = cells[:, :-_SCALE]
            if self.back is not None:
                return _unpacked(cells, behind.view(torch.int32)).matmul(self.back).to(self.dtype)
            scale = behind.view(torch.float32)
        return (cells.view(self.kind).float() * scale).to(self.dtype)


def _unpacked(pairs: Tensor, behind: Tensor) -> Tensor:
    """Numbers ``[n, D]`` of bytes ``[n, D / 2]`` and what lies behind each token's ``[n, 1]`` int32."""
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
    return codes.float().sub_(behind & 15).mul_((behind & ~15).view(torch.float32))


PLAIN = Cells()


def cell_bytes(name: str, dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's key, or value, of one head.

    Args:
        name: of the cache's dtype.
        dim: numbers of a key.
        dtype: of the model.
    """
    if name in _KINDS:
        dim = dim // 2 if name == ROTATED else dim
        return dim + (_SCALE if name.endswith("_per_token_head") else 0)
    return dim * {"bfloat16": 2, "float16": 2, "float32": 4}.get(name, dtype.itemsize)


def unserved(name: str, device: str) -> str | None:
    """Why caches of a dtype are refused, after its name; None where they are served.

    Args:
        name: of the cache's dtype.
        device: vLLM's name of what it runs on.
    """
    if name in SERVED.get(device, ()):
        return None
    why = next((why for start, why in _UNSERVED.items() if name.startswith(start)), None)
    return name if why is None else f"{name} ({why})"


def cells_of(name: str, keys: Any, values: Any, dtype: torch.dtype, back: Tensor | None = None) -> Cells:
    """How a layer writes.

    Args:
        name: of its cache's dtype.
        keys, values: its scales; kept, not copied, since a server may set them late.
        dtype: of the model.
        back: ``[D, D]``, what undoes the rotation of a cache in 4 bits.

    Raises:
        UnsupportedModelError: heads have scales of their own.
    """
    kind = _KINDS.get(name)
    if kind is None:
        return Cells(dtype=dtype)
    if name.endswith("_per_token_head"):
        assert (name == ROTATED) == (back is not None), "numbers that are rotated, and no others, are turned back"
        return Cells(kind, dtype=dtype, back=back)
    if any(isinstance(scale, Tensor) and scale.numel() != 1 for scale in (keys, values)):
        raise UnsupportedModelError(
            "this checkpoint's fp8 KV cache has a scale for each head, with which kvthrift does not compress inside "
            "vLLM. Start with --kv-cache-dtype auto, or with a checkpoint that has one for each layer."
        )
    return Cells(kind, keys, values, dtype)


def shown(queries: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Queries as numbers: a server may hand attention bytes and their scale; None if it does not."""
    return queries if scale is None else (queries.float() * scale).to(dtype)


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """Some rows of a tensor, in whatever dtype they are written."""
    if rows.dtype.itemsize > 1:
        return rows.index_select(0, places)
    return rows.view(torch.uint8).index_select(0, places).view(rows.dtype)
