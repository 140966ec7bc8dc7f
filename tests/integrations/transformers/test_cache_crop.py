"""Going back: cropping, forking and reordering leave what a cache that never went further would hold."""

from __future__ import annotations

import pytest
import torch
from tests.models import text, tiny
from torch import Tensor
from transformers import DynamicCache

import kvthrift

BATCH, PROMPT = 2, 70


@torch.inference_mode()
def read(past: object, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    model = tiny("llama", "sdpa" if isinstance(past, DynamicCache) else "kvthrift")
    logits: Tensor = model(input_ids=ids, past_key_values=past, attention_mask=mask).logits
    return logits


def cache(method: str) -> kvthrift.Cache:
    options = {} if method == "full" else {"budget": 24, "window": 8}
    return kvthrift.Cache(tiny("llama").config, method, page=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["full", "snapkv", "lava"])
@pytest.mark.parametrize("back", [1, 5, 16])
def test_cropped_tokens_never_were(method: str, back: int) -> None:
    ids, wrong, right = text(BATCH, PROMPT), text(BATCH, 17, seed=1), text(BATCH, back, seed=2)
    past, twin = cache(method), cache(method)
    read(past, ids)
    read(twin, ids)
    read(past, wrong)
    read(twin, wrong[:, : 17 - back])
    past.crop(-back)
    assert past.get_seq_length() == twin.get_seq_length() == PROMPT + 17 - back
    torch.testing.assert_close(read(past, right), read(twin, right), atol=1e-5, rtol=1e-5)
    assert past.report().entries == twin.report().entries
    past.check_integrity()


@pytest.mark.parametrize("accepted", [0, 2, 6, 9])
@pytest.mark.parametrize("method", ["snapkv", "cake", "h2o", "expected_attention", "kv_compress", "keydiff"])
def test_rejected_candidates_leave_no_trace_in_what_is_observed(method: str, accepted: int) -> None:
    """Windows, sums and moments are those of the accepted tokens, and so is the compression that follows."""
    ids, guessed = text(BATCH, PROMPT), text(BATCH, 9, seed=1)
    past, twin = (kvthrift.Cache(tiny("llama").config, method, budget=40, page=8, every=12) for _ in range(2))
    read(past, ids)
    read(twin, ids)
    read(past, guessed)
    past.crop(accepted - 9)
    if accepted:
        read(twin, guessed[:, :accepted])
    for mine, theirs in zip(past.state.layers, twin.state.layers, strict=True):
        assert mine.since == theirs.since == accepted
        if mine.window is not None and theirs.window is not None:
            assert torch.equal(mine.window.positions, theirs.window.positions)
            torch.testing.assert_close(mine.window.queries, theirs.window.queries, atol=1e-5, rtol=1e-5)
        if mine.statistics is not None:
            for part in ("count", "total", "outer"):
                one, other = (getattr(x.statistics.moments, part) for x in (mine, theirs))
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
        valid = mine.store.valid()
        assert torch.equal(valid, theirs.store.valid())
        for plane in mine.store.pool.planes:
            one, other = (x.store.plane(plane)[valid] for x in (mine, theirs))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for token in text(BATCH, 15, seed=2).T:
        torch.testing.assert_close(read(past, token[:, None]), read(twin, token[:, None]), atol=1e-4, rtol=1e-4)
    assert past.report().entries == twin.report().entries < (PROMPT + 15 + accepted) * 2 * 2 * BATCH
    past.check_integrity()


@pytest.mark.parametrize(
    ("amount", "length"), [(0, PROMPT), (-3, PROMPT - 3), (PROMPT - 3, PROMPT - 3), (PROMPT + 9, PROMPT)]
)
def test_negative_forgets_so_many_and_positive_keeps_so_many(amount: int, length: int) -> None:
    past = cache("full")
    read(past, text(BATCH, PROMPT))
    past.crop(amount)
    assert past.get_seq_length() == length
    assert past.report().entries == length * 2 * 2 * BATCH


@pytest.mark.parametrize("amount", [-PROMPT, -PROMPT - 50])
def test_a_cache_cropped_to_nothing_begins_anew(amount: int) -> None:
    past, ids = cache("snapkv"), text(BATCH, 90, seed=3)
    read(past, text(BATCH, PROMPT))
    past.crop(amount)
    assert past.get_seq_length() == 0
    assert past.report().entries == 0
    torch.testing.assert_close(read(past, ids), read(cache("snapkv"), ids), atol=1e-5, rtol=1e-5)
    assert past.report().entries == 24 * 2 * 2 * BATCH


def test_a_context_cropped_to_nothing_makes_room_for_another_prompt() -> None:
    model = tiny("llama")
    past = kvthrift.prefill(model, text(BATCH, PROMPT), "snapkv", budget=24, window=8)
    past.crop(-PROMPT)
    read(past, text(BATCH, 90))
    assert {row.most for row in past.report().layers} == {24}


def test_sliding_layers_that_cannot_go_back_leave_all_as_it_was() -> None:
    """Transformers lets them forget what is behind their window unless it is told to record."""
    model = tiny("gemma3")
    caches = [kvthrift.Cache(model.config, "snapkv", budget=24, window=8) for _ in range(2)]
    logits = []
    for past in caches:
        with torch.inference_mode():
            model(input_ids=text(BATCH, PROMPT), past_key_values=past)
            if past is caches[0]:
                with pytest.raises(RuntimeError, match="activate_past_recording"):
                    past.crop(-3)
            assert past.get_seq_length() == PROMPT
            logits.append(model(input_ids=text(BATCH, 3), past_key_values=past).logits)
    assert torch.equal(*logits)


def test_cropping_into_the_prompt_forgets_but_brings_nothing_back() -> None:
    past = cache("snapkv")
    read(past, text(BATCH, PROMPT))
    before = past.report().entries
    past.crop(-8)  # the window of newest tokens
    assert past.get_seq_length() == PROMPT - 8
    assert past.report().entries == before - 8 * 2 * 2 * BATCH
    store = past.state.layers[0].store
    assert store is not None
    assert int(store.positions().max()) < PROMPT - 8


def test_cropping_a_padded_batch_counts_columns_not_tokens() -> None:
    mask = torch.ones(BATCH, PROMPT, dtype=torch.long)
    mask[0, :30] = 0
    past, twin = cache("full"), cache("full")
    read(past, text(BATCH, PROMPT), mask)
    read(twin, text(BATCH, PROMPT)[:, : PROMPT - 10], mask[:, : PROMPT - 10])
    past.crop(-10)
    assert past.report().tokens == twin.report().tokens == (30, 60)
    more, grown = text(BATCH, 2), torch.cat((mask[:, : PROMPT - 10], torch.ones(BATCH, 2).long()), dim=1)
    torch.testing.assert_close(read(past, more, grown), read(twin, more, grown), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "snapkv", "lava"])
def test_forks_go_their_own_ways(method: str) -> None:
    ids = text(BATCH, PROMPT)
    context = cache(method)
    read(context, ids)
    before = context.report().entries
    forks = [context.fork() for _ in range(3)]
    for seed, fork in enumerate(forks):  # one token, some, and enough to be compressed again
        twin = cache(method)
        read(twin, ids)
        for length in (seed * 20 + 1, 1, 3):
            more = text(BATCH, length, seed=seed)
            torch.testing.assert_close(read(fork, more), read(twin, more), atol=1e-5, rtol=1e-5)
    assert context.report().entries == before
    assert context.get_seq_length() == PROMPT
    twin = cache(method)
    read(twin, ids)
    more = text(BATCH, 4, seed=9)
    torch.testing.assert_close(read(context, more), read(twin, more), atol=1e-5, rtol=1e-5)
    del forks, fork
    context.check_integrity()


def test_dropped_forks_give_their_pages_back() -> None:
    context = cache("full")
    read(context, text(BATCH, PROMPT))
    store = context.state.layers[0].store
    assert store is not None
    owned = store.pool.total - store.pool.free
    for seed in range(5):
        read(context.fork(), text(BATCH, 40, seed=seed))
    assert store.pool.total - store.pool.free == owned
    grown = store.pool.total
    for seed in range(5):
        read(context.fork(), text(BATCH, 40, seed=seed))
    assert store.pool.total == grown  # and later ones use them


@pytest.mark.parametrize("method", ["full", "snapkv", "lava"])
def test_reordered_rows_are_the_rows_they_came_from(method: str) -> None:
    ids = text(3, PROMPT)
    past = cache(method)
    read(past, ids)
    past.reorder_cache(torch.tensor([2, 2, 0]))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([True, False, False, True, True, True]))
    past.batch_select_indices(torch.tensor([3, 0, 1, 2]))
    came_from = [0, 2, 2, 0]
    more = text(4, 3, seed=5)
    out = read(past, more)
    past.check_integrity()
    assert past.batch_size == 4
    for row, origin in enumerate(came_from):
        twin = cache(method)
        read(twin, ids[origin : origin + 1])
        torch.testing.assert_close(out[row], read(twin, more[row : row + 1])[0], atol=3e-4, rtol=1e-4)
