"""What heads keep of a prompt inside a server is what the same recipe keeps elsewhere, in whole blocks."""

from __future__ import annotations

import pytest
import torch

import kvthrift
from kvthrift.integrations.vllm.compact import kept_tokens, prompt_view

BLOCK, HEADS, GROUP, DIM = 16, 3, 2, 8


def view_of(prompt: int, window: int = 32) -> kvthrift.LayerView:
    torch.manual_seed(prompt)
    keys, values = torch.randn(HEADS, prompt, DIM), torch.randn(HEADS, prompt, DIM)
    return prompt_view(keys, values, 3 * torch.randn(HEADS * GROUP, window, DIM), scale=0.3, layer=0, layers=1)


@pytest.mark.parametrize("prompt", [160, 167, 175])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "tova", "keydiff", "knorm", "streamingllm", "chunkkv"])
def test_blocks_are_filled_exactly_and_what_is_protected_stays(method: str, prompt: int) -> None:
    recipe, full = kvthrift.method(method, budget=64), prompt // BLOCK
    kept = kept_tokens(recipe, view_of(prompt), block=BLOCK, full=full, kept=4)
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


def test_equal_heads_keep_the_best_scores() -> None:
    view, recipe = view_of(160), kvthrift.method("keydiff", budget=64)
    scores = recipe.scorer.score(view)[0]
    kept = kept_tokens(recipe, view, block=BLOCK, full=10, kept=4)
    for head, tokens in enumerate(kept):
        free = [t for t in tokens.tolist() if t >= recipe.protect.sinks and t < 160 - recipe.protect.recent]
        gone = [t for t in range(160) if t not in set(tokens.tolist())]
        assert scores[head, free].min() >= scores[head, gone].max()


def test_unequal_heads_follow_the_recipes_share() -> None:
    view = view_of(320)
    view.keys[0, 1] *= 6  # this head's attention is sharp: it needs few tokens to hold its mass
    kept = kept_tokens(kvthrift.method("adakv", budget=64), view, block=BLOCK, full=20, kept=4)
    counts = [len(tokens) for tokens in kept]
    assert len(set(counts)) > 1
    assert sum(counts) == 4 * BLOCK * HEADS
