"""One compression of one layer: score, allocate, refine, select, merge. The parts in order, and nothing else.

Pure: takes what is there and returns what stays; who stores it is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate import share_out
from kvthrift.core import LayerView
from kvthrift.errors import BudgetError
from kvthrift.recipe import Recipe
from kvthrift.runtime.step import Ints


@dataclass(frozen=True)
class Kept:
    """What stays of a layer: flat entries ordered by (sequence, head, position), and how many each head holds."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Ints
    planes: dict[str, Tensor]


def protected_entries(recipe: Recipe, view: LayerView) -> Tensor:
    """``[B, H, T]`` bool: sinks and recent window."""
    return (view.tail(recipe.protect.recent) | (view.positions < recipe.protect.sinks)) & view.valid


def check_floor(recipe: Recipe, per_head: Tensor) -> None:
    """Refuse a budget below what the recipe protects.

    Raises:
        BudgetError: with both numbers.
    """
    least = int(per_head.min())
    if least < recipe.protect.entries:
        raise BudgetError(
            f"budget {recipe.budget} gives {least} entries a head, but {recipe.name} always keeps "
            f"{recipe.protect.sinks} sinks and {recipe.protect.recent} recent entries. Raise the budget or "
            "protect less."
        )


def choose(recipe: Recipe, view: LayerView, scores: Tensor, per_head: Tensor) -> Tensor:
    """Which entries of a layer stay, ``[B, H, T]`` bool, given its entries per head ``[B]`` or of each ``[B, H]``."""
    protected = protected_entries(recipe, view)
    contest = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
    counts = recipe.heads.split(contest, per_head, view) if per_head.ndim == 1 else per_head
    counts = torch.minimum(torch.maximum(counts, protected.sum(dim=-1)), view.lengths)
    if recipe.refine is not None:
        scores = recipe.refine.refine(scores, counts, protected, view)
    keep = recipe.unit.select(scores, counts, protected, view)
    return keep | (view.valid & (counts == view.lengths)[..., None])


def gather(recipe: Recipe, view: LayerView, keep: Tensor, scores: Tensor | None, planes: dict[str, Tensor]) -> Kept:
    """Fold or forget what goes, and lay out what stays."""
    keys, values = view.keys, view.values
    if scores is not None and not torch.equal(keep, view.valid):
        merged = recipe.merge.merge(view, keep, scores, planes.get("bias"))
        values = merged.values
        if merged.bias is not None:
            planes = {**planes, "bias": merged.bias}
    lengths = keep.sum(dim=-1)
    if recipe.rerotate:
        if view.rope is None:
            raise ValueError("the runtime did not gather the rotary embedding that was declared")
        steps = torch.arange(keep.shape[-1], device=keep.device)
        gone = (view.lengths - lengths)[..., None] - (steps - (keep.cumsum(dim=-1) - 1))
        keys = view.rope.rotate(keys, gone)
    at = keep.nonzero(as_tuple=True)  # once: on a GPU it waits for the device, and a mask does so each time
    return Kept(
        keys[at],
        values[at],
        view.positions[at],
        lengths.cpu().numpy().astype(np.int64),
        {name: plane[at] for name, plane in planes.items()},
    )


def layer_totals(
    weights: list[Tensor], per_head: Tensor, protected: int, lengths: list[Ints], layers: int
) -> list[Ints]:
    """Entries per head of every layer weighed so far, when ``layers`` share the room for ``per_head`` each.

    Args:
        weights: one ``[B]`` for each layer weighed.
        per_head: ``[B]`` int64 mean over all layers, protected entries included.
        protected: entries per head that are always kept.
        lengths: one ``[B]`` for each layer weighed: entries of its longest head.
        layers: compressed layers of the model, weighed or not.

    Returns:
        One ``[B]`` for each layer weighed.
    """
    table = torch.stack(weights).double().cpu().numpy()  # [N, B]
    caps = np.stack(lengths)  # [N, B]
    out = np.empty_like(caps)
    for b, budget in enumerate(per_head.tolist()):
        free = max(budget - protected, 0) * layers
        kept = np.minimum(caps[:, b], protected)
        out[:, b] = share_out(free, table[:, b], caps[:, b] - kept) + kept
    return list(out)
