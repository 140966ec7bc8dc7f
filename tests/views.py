"""Layer views made of random tensors, and attention over them written out slowly, for parts that know no model.

Places behind a head's last entry hold large garbage, so that a part that reads them is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvthrift.core import LayerView, QueryMoments, Rope, Signals
from kvthrift.part import parts
from kvthrift.recipe import Recipe
from kvthrift.runtime.compress import choose
from kvthrift.score import LinearSurrogate, NetworkSurrogate, PositionBias, QueryCentres, Scorer
from kvthrift.score.surrogate import EXTRA, pack

GARBAGE = 300.0


def layer_view(
    *,
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
    group: int = 1,
    entries: int = 40,
    dim: int = 8,
    value_dim: int | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    seen: int | None = None,
    window: int = 0,
    layer: int = 0,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
) -> LayerView:
    """A view of random keys and values.

    Args:
        lengths: ``[B, H]`` entries of each head; all have ``entries`` by default.
        seen: tokens so far; more than ``entries`` leaves gaps between positions, and the newest token is always there.
        window: newest queries to give along; queries that would stand before the first token are absent.
    """
    rng = torch.Generator().manual_seed(seed)
    counts = torch.full((batch, heads), entries) if lengths is None else torch.tensor(lengths)
    longest = int(counts.max())
    tokens = max(longest, seen or 0)
    real = torch.arange(longest) < counts[..., None]
    keys = torch.randn(batch, heads, longest, dim, generator=rng)
    values = torch.randn(batch, heads, longest, value_dim or dim, generator=rng)
    positions = torch.zeros(batch, heads, longest, dtype=torch.long)
    for b in range(batch):
        for h in range(heads):
            n = int(counts[b, h])
            older = torch.randperm(tokens - 1, generator=rng)[: n - 1].sort().values
            positions[b, h, :n] = torch.cat((older, torch.tensor([tokens - 1])))
    view = LayerView(
        layer=layer,
        layers=layers,
        keys=keys.masked_fill(~real[..., None], GARBAGE).to(dtype),
        values=values.masked_fill(~real[..., None], GARBAGE).to(dtype),
        positions=positions,
        lengths=counts,
        seen=torch.full((batch,), tokens),
        scale=dim**-0.5,
        group=group,
    )
    if window:
        queries = torch.randn(batch, heads * group, window, dim, generator=rng)
        at = torch.arange(tokens - window, tokens).clamp(min=-1).expand(batch, window).clone()
        view.queries = queries.masked_fill((at < 0)[:, None, :, None], GARBAGE).to(dtype)
        view.query_positions = at
    return view


def plain_rope(dim: int, base: float = 100.0, scaling: float = 1.0) -> Rope:
    """A rotary embedding over all ``dim`` dims; a small base, so that short tests turn far."""
    return Rope(1.0 / base ** (torch.arange(0, dim, 2).float() / dim), scaling)


def moments(queries: Tensor) -> QueryMoments:
    """Sums over pre-RoPE queries ``[B, HG, N, D]``."""
    x = queries.float()
    count = torch.full((x.shape[0],), float(x.shape[2]))
    return QueryMoments(count, x.sum(dim=2), x.transpose(-1, -2) @ x)


def eager_rows(
    q: Tensor, k: Tensor, *, q_positions: Tensor, k_positions: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention rows ``[B, H, G, W, T]`` in float64, one row at a time."""
    b, h, t, _ = k.shape
    group, width = q.shape[1] // h, q.shape[2]
    out = torch.zeros(b, h, group, width, t, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for g in range(group):
                for w in range(width):
                    limit = int(q_positions[i, w])
                    sees = [n for n in range(int(lengths[i, j])) if limit >= 0 and int(k_positions[i, j, n]) <= limit]
                    if sees:
                        logits = k[i, j, sees].double() @ q[i, j * group + g, w].double() * scale
                        out[i, j, g, w, sees] = logits.softmax(dim=0)
    return out


def view_rows(view: LayerView) -> Tensor:
    """:func:`eager_rows` of the queries a view was given."""
    assert view.queries is not None
    assert view.query_positions is not None
    return eager_rows(
        view.queries,
        view.keys,
        q_positions=view.query_positions,
        k_positions=view.positions,
        lengths=view.lengths,
        scale=view.scale,
    )


def keep(recipe: Recipe, view: LayerView, per_head: int) -> Tensor:
    """What a recipe with layer-wise budgets keeps of one layer, ``[B, H, T]`` bool."""
    scores = recipe.scorer.score(view).float()
    mean = torch.full((len(view.seen),), per_head)
    return choose(recipe, view, scores, recipe.layers.total(view, mean, recipe.protect.entries))


def kept(recipe: Recipe, view: LayerView, per_head: int) -> list[list[int]]:
    """The positions that each head of the first sequence keeps."""
    mask = keep(recipe, view, per_head)[0]
    return [view.positions[0, h][mask[h]].tolist() for h in range(mask.shape[0])]


def scorers() -> list[Scorer]:
    """Every scorer of the package, with its default options."""
    found = [kind() for _, kind in sorted(parts()["scorer"].items()) if kind.__module__.startswith("kvthrift.")]
    weights = torch.randn(8, 3, 2 * 8 + EXTRA, generator=torch.Generator().manual_seed(0))  # for views of 3 heads
    table = tuple(tuple((0.1 * layer, 0.2 * head, 0.3) for head in range(3)) for layer in range(8))
    centres = torch.rand(8, 6, 8 + 4, generator=torch.Generator().manual_seed(1))  # of 6 query heads
    inner = 0.2 * torch.randn(8, 3, (2 * 8 + EXTRA + 2) * 4 + 1, generator=torch.Generator().manual_seed(2))
    made = (
        LinearSurrogate(pack(weights), 8, 3), PositionBias(edges=(0, 40, 200), bias=table),
        QueryCentres(pack(centres), 8, 6), NetworkSurrogate(pack(inner), 8, 3, 4),
    )  # fmt: skip
    fitted = {scorer.name: scorer for scorer in made}
    return [fitted.get(scorer.name, scorer) for scorer in found if isinstance(scorer, Scorer)]


def top(scores: Tensor, count: int) -> set[int]:
    """The places of the ``count`` largest of ``scores [T]``, ties to the lowest."""
    order = sorted(range(len(scores)), key=lambda n: (-float(scores[n]), n))
    return set(order[:count])


def with_signals(view: LayerView, seed: int = 0, *, needs: Signals | None = None) -> LayerView:
    """The view with every further signal a part may declare; of second passes those in ``needs``."""
    rng = torch.Generator().manual_seed(seed + 1)
    b, h, t, dim = view.keys.shape
    heads = h * view.group
    view.rope = plain_rope(dim)
    view.moments = moments(torch.randn(b, heads, 9, dim, generator=rng))
    view.columns = torch.rand(b, h, t, generator=rng).masked_fill(~view.valid, GARBAGE)
    view.output_weight = torch.randn(heads, view.values.shape[-1], 20, generator=rng)
    view.prompt = view.seen // 3
    tokens = int(view.seen.max())
    view.segments = (torch.rand(b, tokens, generator=rng) < 0.1).long().cumsum(dim=1)  # about 10 tokens each
    sums = needs.powers if needs is not None else ()
    view.powers = {x: torch.rand(b, h, t, generator=rng).masked_fill(~view.valid, GARBAGE) for x in sums}
    passes = needs.second_pass if needs is not None else ()
    view.second_pass = {x: torch.rand(b, h, t, generator=rng).masked_fill(~view.valid, GARBAGE) for x in passes}
    return view


def alone(view: LayerView, b: int) -> LayerView:
    """Sequence ``b`` of a view by itself, without padding that only the others needed."""
    stop = int(view.lengths[b].max())
    found = view.moments
    return replace(
        view,
        keys=view.keys[b : b + 1, :, :stop],
        values=view.values[b : b + 1, :, :stop],
        positions=view.positions[b : b + 1, :, :stop],
        lengths=view.lengths[b : b + 1],
        seen=view.seen[b : b + 1],
        queries=None if view.queries is None else view.queries[b : b + 1],
        query_positions=None if view.query_positions is None else view.query_positions[b : b + 1],
        moments=found and QueryMoments(found.count[b : b + 1], found.total[b : b + 1], found.outer[b : b + 1]),
        columns=None if view.columns is None else view.columns[b : b + 1, :, :stop],
        segments=None if view.segments is None else view.segments[b : b + 1],
        prompt=None if view.prompt is None else view.prompt[b : b + 1],
        powers={wanted: x[b : b + 1, :, :stop] for wanted, x in view.powers.items()},
        second_pass={wanted: x[b : b + 1, :, :stop] for wanted, x in view.second_pass.items()},
        _valid=None,
    )
