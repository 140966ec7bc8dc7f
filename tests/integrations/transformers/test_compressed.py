"""Reading once and compressing often keeps what reading under each recipe would have kept."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import APART
from tests.models import tiny

import kvthrift
from kvthrift.errors import MissingSignalError, RecipeError

NAMES = [name for name in kvthrift.methods() if name not in ("full", *APART)]
IDS = torch.randint(1, 190, (2, 200), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def read() -> kvthrift.Cache:
    return kvthrift.prefill(tiny("llama"), IDS, observe=NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_same_entries_as_from_the_start(read: kvthrift.Cache, name: str) -> None:
    model = tiny("llama")
    recipe = kvthrift.method(name, budget=64)
    direct, later = kvthrift.prefill(model, IDS, recipe), read.compressed(recipe)
    for ours, theirs in zip(later.state.layers, direct.state.layers, strict=True):
        assert ours.store is not None
        assert theirs.store is not None
        assert (ours.store.lengths == theirs.store.lengths).all()
        valid = ours.store.valid()
        assert torch.equal(ours.store.positions()[valid], theirs.store.positions()[valid])
    token = torch.tensor([[7], [8]])
    with torch.no_grad():
        a = model(input_ids=token, past_key_values=later).logits
        b = model(input_ids=token, past_key_values=direct).logits
    torch.testing.assert_close(a, b)
    assert later.report().entries == direct.report().entries


def test_the_uncompressed_cache_stays_as_it_is(read: kvthrift.Cache) -> None:
    before = read.report().entries
    read.compressed("snapkv", budget=40).check_integrity()
    assert read.report().entries == before == 2 * 2 * 2 * 200


def test_what_was_not_observed_is_refused() -> None:
    cache = kvthrift.prefill(tiny("llama"), IDS, observe=["knorm"])
    cache.compressed("keydiff", budget=64)
    for name in ("snapkv", "h2o", "expected_attention"):
        with pytest.raises(MissingSignalError, match="observe="):
            cache.compressed(name, budget=64)


def test_a_wider_window_than_observed_is_refused() -> None:
    cache = kvthrift.prefill(tiny("llama"), IDS, observe=[kvthrift.method("snapkv", window=8)])
    cache.compressed("snapkv", window=4, budget=64)
    with pytest.raises(MissingSignalError):
        cache.compressed("snapkv", window=16, budget=64)


def test_a_compressed_cache_is_refused() -> None:
    cache = kvthrift.prefill(tiny("llama"), IDS, "knorm", budget=64)
    with pytest.raises(RecipeError, match="dropped already"):
        cache.compressed("knorm", budget=32)


def test_a_long_question_does_not_push_out_what_was_read_before_it() -> None:
    model = tiny("llama")
    question = torch.randint(1, 190, (2, 60), generator=torch.Generator().manual_seed(4))
    whole = kvthrift.prefill(model, IDS, observe=["snapkv"])
    for context in (kvthrift.prefill(model, IDS, "snapkv", budget=64), whole.compressed("snapkv", budget=64)):
        with torch.no_grad():
            model(input_ids=question, past_key_values=context)
        assert {row.most for row in context.report().layers} == {64 + 60}
    inside = kvthrift.Cache(model.config, "snapkv", budget=64)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=inside)
        model(input_ids=question, past_key_values=inside)
    assert {row.most for row in inside.report().layers} == {64}


@pytest.mark.parametrize("first", [kvthrift.method("full"), kvthrift.method("snapkv", budget=400)])
def test_a_recipe_that_needs_nothing_leaves_what_others_need(first: kvthrift.Recipe) -> None:
    cache = kvthrift.prefill(tiny("llama"), IDS, observe=["h2o", first])
    before = cache.compressed("h2o", budget=64)
    shares_pages = cache.compressed(first)
    after = cache.compressed("h2o", budget=64)
    assert shares_pages.report().entries == cache.report().entries
    for ours, theirs in zip(after.state.layers, before.state.layers, strict=True):
        assert ours.store is not None
        assert theirs.store is not None
        assert torch.equal(ours.store.positions(), theirs.store.positions())
