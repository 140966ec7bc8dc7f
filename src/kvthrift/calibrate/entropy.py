"""How many directions a head's queries use, and groups of heads and layers by it (2410.03090). Knows no model library.

Truncated matrix entropy: centre a head's query vectors of a text, scale each to length 1, take their covariance with
trace 1, and sum -s ln s over its largest singular values; divided by ln d it lies between 0 and 1. Heads of high
entropy get the larger caches, as in the authors' code (its overview figure names them the other way round).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact
from kvthrift.errors import CalibrationError

KIND = "query_entropy"
TOP = 32  # singular values that are summed over
SHORTEST = 1536  # tokens that the last layer group of the staged form keeps


def truncated_entropy(queries: Tensor, top: int = TOP) -> Tensor:
    """Truncated matrix entropy ``[...]`` float64 of ``queries [..., N, D]``, between 0 and 1.

    Queries that are all equal have entropy 0 (up to 1e-7).
    """
    x = queries.double()
    x = x - x.mean(dim=-2, keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    sigma = x.transpose(-1, -2) @ x / x.shape[-2]
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    dim = x.shape[-1]
    sigma = sigma / trace.clamp(min=1e-12)[..., None, None] + 1e-10 * torch.eye(dim, dtype=x.dtype, device=x.device)
    values = torch.linalg.eigvalsh(sigma).flip(-1)[..., :top].clamp(min=1e-300)  # symmetric: its singular values
    found: Tensor = -(values * values.log()).sum(dim=-1) / math.log(dim)
    return found


def group_sizes(heads: int, groups: int) -> list[int]:
    """Heads of each group: as even as can be, the odd ones to the outermost groups first (11/10/11 of 32)."""
    sizes = [heads // groups] * groups
    outer = [place for pair in zip(range(groups), reversed(range(groups)), strict=True) for place in pair]
    for place in outer[: heads % groups]:
        sizes[place] += 1
    return sizes


def head_groups(entropy: Tensor, groups: int) -> tuple[tuple[int, ...], ...]:
    """Groups of heads by vote of the texts: ``[S, L, H]`` -> labels ``[L][H]``, 0 for the lowest entropy.

    In each text the heads of a layer are ranked and cut into groups. Of two groups, the upper takes the heads with most
    votes for it; of more, each from the lowest on takes those with most votes for it among the rest. Ties go to the
    lowest head.
    """
    heads = entropy.shape[-1]
    sizes = group_sizes(heads, groups)
    label_of_rank = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    ranks = entropy.argsort(dim=-1, stable=True).argsort(dim=-1)
    votes = torch.nn.functional.one_hot(label_of_rank[ranks], groups).sum(dim=0)  # [L, H, groups]
    out = torch.full(votes.shape[:2], 0 if groups == 2 else groups - 1)
    free = torch.ones(votes.shape[:2], dtype=torch.bool)
    for label in [1] if groups == 2 else range(groups - 1):
        wanted = votes[..., label].masked_fill(~free, -1)
        taken = wanted.argsort(dim=-1, descending=True, stable=True)[:, : sizes[label]]
        out.scatter_(1, taken, label)
        free.scatter_(1, taken, False)
    return tuple(tuple(row) for row in out.tolist())


def layer_groups(ranks: Sequence[float], drop: float = 1.0) -> list[int]:
    """Group of every layer: a new one begins where the effective rank falls by more than ``drop``."""
    labels = [0]
    for before, here in pairwise(ranks):
        labels.append(labels[-1] + (before - here > drop))
    return labels


def staged_lengths(labels: Sequence[int], longest: int, shortest: int = SHORTEST) -> list[int]:
    """Tokens that each layer keeps in the staged form, falling evenly from group to group.

    Args:
        labels: group of every layer, rising from 0.
        longest: the model's most tokens, which the first group keeps.
        shortest: what the last one keeps.
    """
    last = max(labels[-1], 1)
    step = (longest - shortest) // last
    return [longest if labels[-1] == 0 else shortest + step * (last - label) for label in labels]


def entropies(artefact: Artefact) -> Tensor:
    """Entropies ``[S, L, H, G]`` float64 of an artefact: texts, layers, KV heads, query heads of each.

    Raises:
        CalibrationError: it has none, or not one number between 0 and 1 for every head.
    """
    table, meta = artefact.tensors.get("entropy"), artefact.meta
    if (
        table is None
        or table.ndim != 3
        or not len(table)
        or table.shape[1] != meta.layers
        or table.shape[2] % meta.kv_heads
        or not bool((table.isfinite() & (table >= 0) & (table <= 1.001)).all())
    ):
        raise CalibrationError(
            f"this calibration has no entropy between 0 and 1 for every query head of {meta.layers} layers of "
            f"{meta.kv_heads} KV heads. Calibrate again."
        )
    return table.double().view(len(table), meta.layers, meta.kv_heads, -1)


def effective_ranks(table: Tensor, dim: int) -> list[float]:
    """exp of each layer's mean entropy (nats, not divided by ln d), from ``[S, L, ...]``."""
    return (table.flatten(2).mean(dim=(0, 2)) * math.log(dim)).exp().tolist()
