"""One compression of one layer: score, allocate, refine, select, merge. The parts in order, and nothing else.

Pure: takes what is there and returns what stays; who stores it is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate import share_out
from kvthrift.allocate.paged import PageRoom
from kvthrift.core import LayerView
from kvthrift.errors import BudgetError
from kvthrift.recipe import Recipe
from kvthrift.runtime.step import Bools, Ints
from kvthrift.store import on_device


@dataclass(frozen=True)
class Kept:
    """What stays of a layer: flat entries ordered by (sequence, head, position), and how many each head holds.

    ``lengths [B, H]`` are on the device where the host does not know them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Ints | Tensor
    planes: dict[str, Tensor]


@dataclass(frozen=True)
class Foretold:
    """What the host knows of a choice before the device has made it: entries in all, and perhaps of each head."""

    total: int
    lengths: Ints | None = None


def protected_entries(recipe: Recipe, view: LayerView) -> Tensor:
    """``[B, H, T]`` bool: sinks and recent window."""
    recent, sinks = view.tail(recipe.protect.recent), recipe.protect.sinks
    return recent if not sinks else (recent | (view.positions < sinks)) & view.valid


def check_floor(recipe: Recipe, per_head: Ints | Tensor) -> None:
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


def check_prompt(recipe: Recipe, prompt: Ints, rooms: Ints) -> None:
    """Refuse a budget that cannot hold a prompt which is to stay.

    Args:
        recipe: what asks for it.
        prompt: ``[B]`` tokens of the prompt.
        rooms: ``[B]`` entries per head that the budget comes to.

    Raises:
        BudgetError: with both numbers.
    """
    if (rooms >= prompt + recipe.protect.recent).all():
        return
    row = int((rooms - prompt).argmin())
    newest = f" and the {recipe.protect.recent} newest entries" if recipe.protect.recent else ""
    raise BudgetError(
        f"budget {recipe.budget} gives {rooms[row]} entries a head, but {recipe.name} always keeps the prompt's "
        f"{prompt[row]} tokens{newest}. Give more, in entries or bytes (a share of what is read is always less), or "
        "let the prompt compete (prompt=scored, or pinned=false in a recipe)."
    )


def foretell(recipe: Recipe, view: LayerView, per_head: Ints, whole: Bools) -> Foretold | None:
    """How many entries will stay, if the host can tell without a look at scores.

    Args:
        per_head: ``[B]`` entries per head of this layer.
        whole: ``[B]`` sequences that stay whole.
    """
    there = view.known_lengths
    if there is None or not recipe.unit.exact:
        return None
    counts = recipe.heads.known(per_head, view)
    if counts is not None:
        counts = np.where(whole[:, None], there, np.minimum(counts, there))
        if (counts < np.minimum(there, recipe.protect.entries)).any():
            return None  # what is protected may be more
        return Foretold(int(counts.sum()), counts)
    if not recipe.heads.exact or (~whole & (per_head < max(recipe.protect.entries, 1))).any():
        return None
    rows = there.sum(axis=1)
    return Foretold(int(np.where(whole, rows, np.minimum(per_head * there.shape[1], rows)).sum()))


def choose(
    recipe: Recipe,
    view: LayerView,
    scores: Tensor,
    per_head: Tensor,
    known: Ints | None = None,
    pages: PageRoom | None = None,
) -> Tensor:
    """Which entries of a layer stay, ``[B, H, T]`` bool, given its entries per head ``[B]`` or of each ``[B, H]``.

    ``known [B, H]`` are the entries of each head, if they were foretold; else what ``pages`` grants may round them.
    """
    protected = protected_entries(recipe, view)
    if known is None:
        counts = per_head
        if per_head.ndim == 1:
            contest = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
            counts = recipe.heads.split(contest, per_head, view)
        counts = torch.minimum(torch.maximum(counts, protected.sum(dim=-1)), view.lengths)
        if pages is not None:
            even = recipe.heads.uniform and per_head.ndim == 1
            asked = counts.cpu().numpy().astype(np.int64)
            counts = on_device(pages.grant(asked, view.counted, even=even), scores.device)
    else:
        counts = on_device(known, scores.device)
    if recipe.refine is not None:
        scores = recipe.refine.refine(scores, counts, protected, view)
    keep = recipe.unit.select(scores, counts, protected, view)
    return keep if recipe.unit.exact else keep | (view.valid & (counts == view.lengths)[..., None])


def everything(keep: Tensor, view: LayerView, foretold: Foretold | None) -> bool:
    """Whether nothing goes; waits for the device unless that was foretold."""
    return torch.equal(keep, view.valid) if foretold is None else foretold.total == int(view.counted.sum())


def gather(
    recipe: Recipe,
    view: LayerView,
    keep: Tensor,
    scores: Tensor | None,
    planes: dict[str, Tensor],
    foretold: Foretold | None = None,
) -> Kept:
    """Fold or forget what goes, and lay out what stays; waits for the device unless that was foretold."""
    keys, values = view.keys, view.values
    if scores is not None and not everything(keep, view, foretold):
        merged = recipe.merge.merge(view, keep, scores, planes.get("bias"))
        values = merged.values
        if merged.bias is not None:
            planes = {**planes, "bias": merged.bias}
    if recipe.rerotate:
        if view.rope is None:
            raise ValueError("the runtime did not gather the rotary embedding that was declared")
        steps = torch.arange(keep.shape[-1], device=keep.device)
        lost = (view.lengths - keep.sum(dim=-1))[..., None]
        keys = view.rope.rotate(keys, lost - (steps - (keep.cumsum(dim=-1) - 1)))
    at = _places(keep, foretold)
    entries = {name: plane[at] for name, plane in planes.items()}
    return Kept(keys[at], values[at], view.positions[at], _counts(keep, foretold), entries)


def _places(keep: Tensor, foretold: Foretold | None) -> tuple[Tensor, ...]:
    """Where ``keep`` is true; unless it was foretold in how many places, a GPU is waited for, once."""
    return keep.nonzero(as_tuple=True) if foretold is None else keep.nonzero_static(size=foretold.total).unbind(1)


def _counts(keep: Tensor, foretold: Foretold | None) -> Ints | Tensor:
    """How many entries each head keeps."""
    if foretold is None:
        return keep.sum(dim=-1).cpu().numpy().astype(np.int64)
    return keep.sum(dim=-1) if foretold.lengths is None else foretold.lengths


def layer_totals(
    weights: list[Tensor], per_head: Ints | Tensor, protected: int, lengths: list[Ints], layers: int, floor: int = 0
) -> list[Ints]:
    """Entries per head of every layer weighed so far, when ``layers`` share the room for ``per_head`` each.

    Args:
        weights: one ``[B]`` for each layer weighed.
        per_head: ``[B]`` int64 mean over all layers, protected entries included.
        protected: entries per head that are always kept.
        lengths: one ``[B]`` for each layer weighed: entries of its longest head.
        layers: compressed layers of the model, weighed or not.
        floor: entries per head that no layer is given less of, if it has them; at most the mean.

    Returns:
        One ``[B]`` for each layer weighed.
    """
    table = torch.stack(weights).double().cpu().numpy()  # [N, B]
    caps = np.stack(lengths)  # [N, B]
    out = np.empty_like(caps)
    for b, budget in enumerate(map(int, per_head)):
        free = max(budget - protected, 0) * layers
        kept = np.minimum(caps[:, b], protected)
        out[:, b] = share_out(free, table[:, b], caps[:, b] - kept) + kept
        least = np.minimum(caps[:, b], floor)
        more = (least - out[:, b]).clip(min=0)
        spare = (out[:, b] - least).clip(min=0)
        out[:, b] += more - share_out(int(more.sum()), spare.astype(np.float64), spare)
    return list(out)
