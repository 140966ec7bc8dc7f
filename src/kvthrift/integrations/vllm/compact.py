"""Which tokens of a finished prompt stay, by the same parts as everywhere else. Knows no vLLM class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvthrift.allocate import share_out
from kvthrift.core import LayerView
from kvthrift.recipe import Protect, Recipe
from kvthrift.runtime.compress import choose, protected_entries


def prompt_view(keys: Tensor, values: Tensor, queries: Tensor, *, scale: float, layer: int, layers: int) -> LayerView:
    """One request's prompt as parts see it.

    Args:
        keys, values: ``[H, P, D]`` of the whole prompt, post-RoPE.
        queries: ``[HG, W, D]`` of its last W tokens, post-RoPE.
        scale: softmax scale.
        layer, layers: index of this layer, and their number.
    """
    heads, prompt, _ = keys.shape
    window = queries.shape[1]
    return LayerView(
        layer=layer,
        layers=layers,
        keys=keys[None],
        values=values[None],
        positions=torch.arange(prompt, device=keys.device).expand(1, heads, prompt),
        lengths=torch.full((1, heads), prompt, device=keys.device),
        seen=torch.tensor([prompt], device=keys.device),
        scale=scale,
        group=queries.shape[0] // heads,
        queries=queries[None],
        query_positions=torch.arange(prompt - window, prompt, device=keys.device)[None],
    )


def kept_tokens(recipe: Recipe, view: LayerView, *, block: int, full: int, kept: int) -> list[Tensor]:
    """The tokens that each head keeps of a prompt's full blocks; those behind them stay in any case.

    Budgets are whole blocks: of equal heads ``kept`` each, of others as many in all, shared out as the recipe's heads
    part would and rounded so that the sum is exact.

    Args:
        recipe: what to keep.
        view: of :func:`prompt_view`.
        block: tokens a block.
        full: full blocks of the prompt.
        kept: blocks that are kept of them, a head on average.

    Returns:
        For each head its tokens, ascending; as many as its blocks hold.
    """
    heads, prompt = view.keys.shape[1], view.keys.shape[2]
    tokens = full * block
    tail = prompt - tokens
    own = recipe.with_options(protect=Protect(recipe.protect.sinks, max(recipe.protect.recent, tail)))
    scores = own.scorer.score(view).float()
    pages = np.full(heads, kept)
    if not own.heads.uniform:
        pages = _pages(own, view, scores, block=block, full=full, kept=kept)
    counts = torch.from_numpy(pages * block + tail).to(view.keys.device)[None]
    chosen = choose(own, view, scores, counts)[0, :, :tokens]
    # a unit may fill less than its room: the next best fill it up
    order = scores[0, :, :tokens].masked_fill(chosen, float("inf")).argsort(dim=-1, descending=True, stable=True)
    return [order[head, : int(count) * block].sort().values for head, count in enumerate(pages)]


def _pages(recipe: Recipe, view: LayerView, scores: Tensor, *, block: int, full: int, kept: int) -> np.ndarray:
    """Whole blocks for each head ``[H]``, ``kept * H`` in all, at least what is protected."""
    heads, tail = view.keys.shape[1], view.keys.shape[2] - full * block
    protected = protected_entries(recipe, view)
    contest = scores.masked_fill(protected, float("inf"))
    mean = torch.tensor([kept * block + tail], device=scores.device)
    wanted = (recipe.heads.split(contest, mean, view)[0].double().cpu().numpy() - tail) / block
    least = max(1, -(-int(protected[0, 0, : full * block].sum()) // block))
    least = min(least, kept)
    free = np.maximum(wanted - least, 0) + 1e-9
    return np.asarray(share_out((kept - least) * heads, free, np.full(heads, full - least)) + least)
