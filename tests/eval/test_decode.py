"""Following a reference and answering freely are one way up to the first mismatch."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import APART
from tests.models import text, tiny

import kvthrift
from kvthrift import Cache, Recipe, method
from kvthrift.eval.decode import Answer, Decoder, all_at_once, answer, feed, follow, read
from kvthrift.eval.metrics.agreement import compare

IDS = text(1, 150, seed=5)[0].tolist()
ASK = text(1, 9, seed=6)[0].tolist()
LIMIT = 14
NAMES = [name for name in kvthrift.methods() if name not in ("full", *APART)]


def asked(recipe: Recipe) -> Decoder:
    """A decoder behind a context compressed by ``recipe`` and a question."""
    model = tiny("llama")
    cache = read(model, IDS, recipe, page=16).cache
    return Decoder(model, cache, [feed(model, cache, ASK)])


def full() -> tuple[Decoder, Answer]:
    decoder = asked(method("full"))
    return decoder, answer(decoder, LIMIT, frozenset())


@pytest.mark.parametrize(("name", "every"), [*((name, None) for name in NAMES), ("snapkv", 4), ("h2o", 4), ("lava", 4)])
def test_first_mismatch_is_where_free_answers_part(name: str, every: int | None) -> None:
    reference, said = full()
    recipe = method(name, budget=48, every=every)
    free = answer(asked(recipe), LIMIT, frozenset())
    decoder = asked(recipe)
    followed = follow(decoder, said, LIMIT, frozenset())
    assert followed == free
    found = compare(reference.table(), decoder.table(), said.tokens)
    parted = next((step for step, (a, b) in enumerate(zip(free.tokens, said.tokens, strict=True)) if a != b), None)
    assert found.first_divergence == parted
    assert len(decoder.seconds) == LIMIT - 1


def test_a_budget_above_the_length_agrees() -> None:
    reference, said = full()
    decoder = asked(method("snapkv", budget=400))
    assert follow(decoder, said, LIMIT, frozenset()) == said
    assert torch.equal(reference.table(), decoder.table())


def test_answers_stop_at_an_end_token() -> None:
    _, said = full()
    end = said.tokens[5]
    place = said.tokens.index(end)
    stopped = answer(asked(method("full")), LIMIT, frozenset({end}))
    assert stopped == Answer(said.tokens[: place + 1], cut=False)
    assert said.cut
    free = answer(asked(method("random", budget=48)), LIMIT, frozenset({end}))
    assert follow(asked(method("random", budget=48)), stopped, LIMIT, frozenset({end})) == free


def test_a_tie_stays_with_the_reference() -> None:
    model = tiny("llama")
    decoder = asked(method("full"))
    tied = torch.zeros_like(decoder.logits[0])
    decoder.logits = [tied]
    assert model.config.vocab_size > 7
    assert follow(decoder, Answer((7,), cut=True), 1, frozenset()).tokens == (7,)


def test_one_pass_over_an_answer_is_the_same_up_to_rounding() -> None:
    decoder, said = full()
    table = decoder.table()
    again = all_at_once(decoder, said.tokens)
    assert again is not None
    torch.testing.assert_close(again, table, atol=1e-4, rtol=1e-4)
    assert decoder.cache.get_seq_length() == len(IDS) + len(ASK) + LIMIT - 1


def test_a_cache_that_cannot_be_cropped_is_left_alone() -> None:
    decoder = asked(method("knorm", budget=48, every=4))
    said = answer(decoder, 6, frozenset())
    assert all_at_once(decoder, said.tokens) is None


def test_questions_are_kept_whole() -> None:
    long = text(1, 60, seed=8)[0].tolist()
    model = tiny("llama")
    cache = read(model, IDS, method("random", budget=48), page=16).cache
    before = cache.report().entries
    feed(model, cache, long)
    assert cache.report().entries == before + len(long) * 4  # 2 layers of 2 heads


def test_looking_leaves_no_trace() -> None:
    for recipe in (
        method("snapkv", budget=48),
        method("h2o", budget=48, decode=True),
        method("snapkv", budget=48, every=4),
    ):
        looked, blind = asked(recipe), asked(recipe)
        blind.keeps = False
        for token in (3, 5, 8, 13, 21):
            looked.step(token)
            blind.step(token)
        assert looked.looks
        assert not blind.looks
        assert torch.equal(looked.logits[-1], blind.logits[-1])
        assert looked.cache.report().bytes == blind.cache.report().bytes
        assert looked.cache.state.recipe == recipe
        assert isinstance(looked.cache, Cache)
