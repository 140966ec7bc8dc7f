"""Tables of a bias for each head and each bin of positions (2410.00161). Knows no model library.

The paper's code reads such a table and weighs it by 0 in its main runs; how it was made is not published, so there is
no measurement here, only the file: :func:`kvthrift.calibrate.save` writes it, of kind ``KIND`` with two tensors,
``edges [N]`` (first positions of the bins, rising from 0) and ``bias [L, H, N]`` (in units of the scores it is added
to). :func:`bin_means` is a start for one: what a head's scores are on average where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact
from kvthrift.errors import CalibrationError

KIND = "position_bias"
Table = tuple[tuple[tuple[float, ...], ...], ...]


def bin_means(scores: Tensor, positions: Tensor, edges: Tensor) -> Tensor:
    """Mean score of every head in every bin, ``[H, N]`` float32; 0 where a bin has no entry.

    Args:
        scores: ``[H, T]``.
        positions: ``[H, T]`` int64, true token positions.
        edges: ``[N]`` int64, the first position of every bin.
    """
    bins = torch.bucketize(positions.contiguous(), edges[1:], right=True)
    empty = torch.zeros(len(scores), len(edges), device=scores.device)
    count = empty.scatter_add(1, bins, torch.ones_like(scores, dtype=torch.float32))
    return empty.scatter_add(1, bins, scores.float()) / count.clamp(min=1)


def biases(artefact: Artefact) -> tuple[tuple[int, ...], Table]:
    """Edges ``[N]`` and biases ``[L][H][N]`` of an artefact.

    Raises:
        CalibrationError: it has none for every head of its model, or they are not finite, or edges do not rise.
    """
    meta, edges, bias = artefact.meta, artefact.tensors.get("edges"), artefact.tensors.get("bias")
    whole = edges is not None and bias is not None and edges.ndim == 1 and len(edges) > 0
    if not whole or edges is None or bias is None or tuple(bias.shape) != (meta.layers, meta.kv_heads, len(edges)):
        raise CalibrationError(
            f"this calibration has no edges of bins, or no bias in each of them for {meta.layers} layers of "
            f"{meta.kv_heads} KV heads. Make the table again."
        )
    rising = int(edges[0]) == 0 and bool((edges.diff() > 0).all()) and not edges.is_floating_point()
    if not rising or not bool(bias.isfinite().all()):
        raise CalibrationError(
            "this calibration's edges are not whole positions that rise from 0, or its biases are not finite numbers. "
            "Make the table again."
        )
    table = tuple(tuple(tuple(row) for row in layer) for layer in bias.double().tolist())
    return tuple(int(edge) for edge in edges), table
