"""Which tokens of a request stay, by the same parts as everywhere else. Knows no vLLM class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvthrift.allocate import share_out
from kvthrift.core import LayerView
from kvthrift.recipe import Protect, Recipe
from kvthrift.runtime.compress import choose, protected_entries
from kvthrift.store import on_device


def request_view(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    positions: Sequence[Tensor],
    queries: Tensor,
    *,
    seen: int,
    scale: float,
    layer: int,
    layers: int,
) -> LayerView:
    """One request as parts see it.

    Args:
        keys, values: ``[n_h, D]`` of each head, post-RoPE, in position order.
        positions: ``[n_h]`` of each head.
        queries: ``[HG, W, D]`` of its last W tokens, post-RoPE.
        seen: tokens so far.
        scale: softmax scale.
        layer, layers: index of this layer, and their number.
    """
    window, device = queries.shape[1], queries.device
    return LayerView(
        layer=layer,
        layers=layers,
        keys=pad_sequence(list(keys), batch_first=True)[None],
        values=pad_sequence(list(values), batch_first=True)[None],
        positions=pad_sequence(list(positions), batch_first=True).to(device)[None],
        lengths=torch.tensor([[len(head) for head in keys]], device=device),
        seen=torch.tensor([seen], device=device),
        scale=scale,
        group=queries.shape[0] // len(keys),
        queries=queries[None],
        query_positions=torch.arange(seen - window, seen, device=device)[None],
    )


def kept_entries(recipe: Recipe, view: LayerView, *, block: int, kept: int) -> list[Tensor]:
    """The entries that each head keeps of those in full blocks; the tokens behind the last of them stay in any case.

    Budgets are whole blocks: of equal heads ``kept`` each, of others as many in all, shared out as the recipe's heads
    part would and rounded so that the sum is exact.

    Args:
        recipe: what to keep.
        view: of :func:`request_view`.
        block: tokens a block.
        kept: blocks that are kept, a head on average.

    Returns:
        For each head its entries, ascending; as many as its blocks hold.
    """
    tail = int(view.seen[0]) % block
    own = recipe.with_options(protect=Protect(recipe.protect.sinks, max(recipe.protect.recent, tail)))
    scores = own.scorer.score(view).float()
    full = view.lengths[0].cpu().numpy() // block  # [H]: blocks that each head has
    pages = np.full(len(full), kept)
    if not own.heads.uniform:
        pages = _pages(own, view, scores, block=block, full=full, kept=kept)
    counts = on_device(pages * block + tail, view.keys.device)[None]
    chosen = choose(own, view, scores, counts)[0]
    inside = torch.arange(chosen.shape[-1], device=chosen.device) < on_device(full * block, chosen.device)[:, None]
    taken = chosen & inside
    room = (pages * block).tolist()
    if taken.sum(-1).tolist() == room:
        return list(torch.split(taken.nonzero()[:, 1], room))
    # a unit may fill less than its room: the next best fill it up
    ranked = scores[0].masked_fill(chosen, float("inf"))
    found = []
    for head, (count, there) in enumerate(zip(room, full.tolist(), strict=True)):
        order = ranked[head, : there * block].argsort(descending=True, stable=True)
        found.append(order[:count].sort().values)
    return found


def _pages(recipe: Recipe, view: LayerView, scores: Tensor, *, block: int, full: np.ndarray, kept: int) -> np.ndarray:
    """Whole blocks for each head ``[H]``, ``kept * H`` in all, at least what is protected."""
    tail = int(view.seen[0]) % block
    protected = protected_entries(recipe, view)
    contest = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
    mean = torch.tensor([kept * block + tail], device=scores.device)
    wanted = (recipe.heads.split(contest, mean, view)[0].double().cpu().numpy() - tail) / block
    least = np.maximum(1, -(-(protected[0].sum(-1).cpu().numpy() - tail) // block))
    least = np.minimum(np.minimum(least, kept), full)
    free = np.maximum(wanted - least, 0) + 1e-9
    return np.asarray(share_out(kept * len(full) - int(least.sum()), free, full - least) + least)
