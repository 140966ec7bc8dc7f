"""What heads keep of a request inside a server is what the same recipe keeps elsewhere, in whole blocks."""

from __future__ import annotations

import pytest
import torch

import kvthrift
from kvthrift.integrations.vllm.compact import kept_entries, request_view

BLOCK, HEADS, GROUP, DIM = 16, 3, 2, 8


def view_of(prompt: int, window: int = 32, *, before: tuple[int, ...] = ()) -> kvthrift.LayerView:
    """A prompt; or one of which heads kept ``before`` blocks each, and ``prompt`` more tokens behind block 40."""
    torch.manual_seed(prompt)
    counts = [kept * BLOCK + prompt for kept in before or (0,) * HEADS]
    keys, values = ([torch.randn(n, DIM) for n in counts] for _ in range(2))
    start = 40 * BLOCK if before else 0
    positions = [
        torch.cat((torch.randperm(start)[: n - prompt].sort().values, torch.arange(start, start + prompt)))
        for n in counts
    ]
    queries = 3 * torch.randn(HEADS * GROUP, window, DIM)
    return request_view(keys, values, positions, queries, seen=start + prompt, scale=0.3, layer=0, layers=1)


METHODS = ["snapkv", "adakv", "tova", "keydiff", "knorm", "streamingllm", "chunkkv"]


@pytest.mark.parametrize("prompt", [160, 167, 175])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_filled_exactly_and_what_is_protected_stays(method: str, prompt: int) -> None:
    recipe, full = kvthrift.method(method, budget=64), prompt // BLOCK
    kept = kept_entries(recipe, view_of(prompt), block=BLOCK, kept=4)
    assert sum(len(tokens) for tokens in kept) == 4 * BLOCK * HEADS
    for tokens in kept:
        assert len(tokens) % BLOCK == 0
        assert len(tokens)
        assert (tokens.diff() > 0).all()
        assert tokens[-1] < full * BLOCK
        recent = range(max(prompt - recipe.protect.recent, 0), full * BLOCK)
        assert {*range(recipe.protect.sinks), *recent} <= set(tokens.tolist())
    if recipe.heads.uniform:
        assert {len(tokens) for tokens in kept} == {4 * BLOCK}


@pytest.mark.parametrize("more", [1, 15, 16, 37])
@pytest.mark.parametrize(
    ("method", "before"),
    [("adakv", (1, 9, 2)), *((name, (4, 4, 4)) for name in METHODS if name != "chunkkv")],  # equal heads stay equal
)
def test_the_second_time_heads_of_any_lengths_give_back_what_was_gained(
    method: str, before: tuple[int, ...], more: int
) -> None:
    recipe = kvthrift.method(method, budget=64)
    view = view_of(more, window=min(more, 32), before=before)
    kept = kept_entries(recipe, view, block=BLOCK, kept=4)
    assert sum(len(tokens) for tokens in kept) == 4 * BLOCK * HEADS
    for head, tokens in enumerate(kept):
        there = int(view.lengths[0, head])
        assert len(tokens) % BLOCK == 0
        assert len(tokens)
        assert (tokens.diff() > 0).all()
        assert tokens[-1] < there - more % BLOCK  # neither padding nor the partial block, which stays by itself
        positions = view.positions[0, head]
        first = (positions[: there - more % BLOCK] < recipe.protect.sinks).nonzero()[:, 0].tolist()
        recent = range(max(there - recipe.protect.recent, 0), there - more % BLOCK)
        assert {*first, *recent} <= set(tokens.tolist())


def test_padding_decides_nothing() -> None:
    view = view_of(37, before=(1, 9, 2))
    recipe = kvthrift.method("adakv", budget=64)
    want = kept_entries(recipe, view, block=BLOCK, kept=4)
    view.keys[~view.valid] = 1e4
    view.values[~view.valid] = float("nan")
    got = kept_entries(recipe, view, block=BLOCK, kept=4)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_equal_heads_keep_the_best_scores() -> None:
    view, recipe = view_of(160), kvthrift.method("keydiff", budget=64)
    scores = recipe.scorer.score(view)[0]
    kept = kept_entries(recipe, view, block=BLOCK, kept=4)
    for head, tokens in enumerate(kept):
        free = [t for t in tokens.tolist() if t >= recipe.protect.sinks and t < 160 - recipe.protect.recent]
        gone = [t for t in range(160) if t not in set(tokens.tolist())]
        assert scores[head, free].min() >= scores[head, gone].max()


def test_unequal_heads_follow_the_recipes_share() -> None:
    view = view_of(320)
    view.keys[0, 1] *= 6  # this head's attention is sharp: it needs few tokens to hold its mass
    kept = kept_entries(kvthrift.method("adakv", budget=64), view, block=BLOCK, kept=4)
    counts = [len(tokens) for tokens in kept]
    assert len(set(counts)) > 1
    assert sum(counts) == 4 * BLOCK * HEADS
