"""Mean pre-RoPE queries of every head, and mean lengths of their rotated pairs (2604.04921). Knows no model library."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact
from kvthrift.errors import CalibrationError

KIND = "query_centres"


def query_means(queries: Tensor, half: int) -> Tensor:
    """``[HG, D + half]`` float64 of pre-RoPE ``queries [HG, N, D]``: their mean, and the mean length of each pair.

    Pairs are dims ``f`` and ``f + half``; dims behind ``2 * half`` are not rotated and have none.
    """
    x = queries.double()
    lengths = torch.hypot(x[..., :half], x[..., half : 2 * half])
    return torch.cat((x.mean(dim=1), lengths.mean(dim=1)), dim=-1)


def as_text(table: Tensor) -> dict[str, object]:
    """A tensor as plain data, in float32."""
    flat = table.float().contiguous().numpy().astype("<f4")
    return {"shape": list(table.shape), "numbers": base64.b64encode(flat.tobytes()).decode("ascii")}


def join(results: Sequence[dict[str, object]]) -> Tensor:
    """Mean of texts of equal length, each as :func:`as_text` wrote it; float64."""
    rows = [
        torch.from_numpy(np.frombuffer(base64.b64decode(str(x["numbers"])), "<f4").astype(np.float64)) for x in results
    ]
    return torch.stack(rows).mean(dim=0).reshape(*results[0]["shape"])  # type: ignore[misc]


def concentration(table: Tensor, dim: int) -> Tensor:
    """How far queries point one way, ``[L, HG]`` between 0 and 1: lengths of means over means of lengths.

    Args:
        table: ``[L, HG, dim + half]``, see :func:`query_means`.
        dim: head dim.
    """
    half = table.shape[-1] - dim
    wide = table.double()
    means = torch.hypot(wide[..., :half], wide[..., half : 2 * half])
    return means.sum(dim=-1) / wide[..., dim:].sum(dim=-1).clamp(min=1e-12)


def centres(artefact: Artefact) -> Tensor:
    """The table ``[L, HG, D + half]`` of an artefact.

    Raises:
        CalibrationError: it has none for every head of its model.
    """
    found, meta = artefact.tensors.get("centres"), artefact.meta
    sound = found is not None and found.ndim == 3 and bool(found.isfinite().all()) and found.shape[0] == meta.layers
    if found is None or not sound or not found.shape[1] or found.shape[1] % meta.kv_heads:
        raise CalibrationError(
            f"this calibration has no finite mean query for every query head of {meta.layers} layers of "
            f"{meta.kv_heads} KV heads. Calibrate again."
        )
    return found
