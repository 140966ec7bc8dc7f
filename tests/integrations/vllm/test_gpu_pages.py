"""Pages of one head in a server's blocks, also where other layers' lie between them; and where queries of steps lie."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.gpu_heads import query_places
from kvthrift.integrations.vllm.gpu_pages import Pages

BLOCKS, HEADS, SIZE, DIM = 6, 3, 4, 5


@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_moved_head_by_head_is_what_the_block_holds(layers: int) -> None:
    cache = torch.randn(BLOCKS, layers, HEADS, SIZE, 2 * DIM)[:, -1]
    pages, was = Pages(cache), cache.clone()
    assert pages.step == layers * HEADS
    blocks = torch.tensor([4, 0])
    keys, values = pages.read(pages.of(blocks))
    for head in range(HEADS):
        assert torch.equal(keys[head], was[blocks, head, :, :DIM].flatten(0, 1))
        assert torch.equal(values[head], was[blocks, head, :, DIM:].flatten(0, 1))
    target = pages.shared_out(blocks, [3, 1, 2])
    given = [torch.randint(0, 2 * SIZE, (n * SIZE,)) for n in (3, 1, 2)]
    pages.move(pages.of(blocks), given, target)
    flat = cache[blocks].flatten(0, 1)  # pages in the order of blocks and heads
    for part, found in ((keys, flat[..., :DIM]), (values, flat[..., DIM:])):
        assert torch.equal(found.flatten(0, 1), torch.cat([part[head][own] for head, own in enumerate(given)]))
    others = [block for block in range(BLOCKS) if block not in blocks.tolist()]
    assert torch.equal(cache[others], was[others])
    again, _ = pages.read(target)
    assert all(torch.equal(again[head], keys[head][own]) for head, own in enumerate(given))


def test_a_cache_that_was_made_anew_is_noticed() -> None:
    cache = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM)
    assert Pages(cache).of_cache(cache)
    assert not Pages(cache).of_cache(cache[:4])
    assert not Pages(cache).of_cache(cache.clone())


def test_blocks_in_which_heads_take_turns_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="VLLM_KV_CACHE_LAYOUT"):
        Pages(torch.zeros(BLOCKS, SIZE, HEADS, 2 * DIM).transpose(1, 2))


@pytest.mark.parametrize("starts", [[0, 1], [0, 3, 4, 4, 9], [0, 1, 2, 65]])
def test_queries_of_a_head_of_a_request_lie_together(starts: list[int]) -> None:
    begins, places = query_places(starts, HEADS)
    tokens, heads = places // HEADS, places % HEADS
    row = 0
    for first, last in pairwise(starts):
        for head in range(HEADS):
            own = slice(begins[row], begins[row + 1])
            assert tokens[own].tolist() == list(range(first, last))
            assert set(heads[own].tolist()) <= {head}
            row += 1
    assert begins[-1] == len(places) == starts[-1] * HEADS
