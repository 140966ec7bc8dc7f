"""TriAttention's specification: what stays while decoding, when, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.fitted import query_centres
from tests.models import build, config, text, tiny
from tests.reading import held
from torch import Tensor

import kvthrift
from kvthrift import Budget, BudgetError, Cache, Protect, Recipe, method, prefill
from kvthrift.allocate import AdaptiveHeads, AgreedLayers, PoolLayers, UniformLayers
from kvthrift.merge import Evict
from kvthrift.runtime.fixed import FixedSteps
from kvthrift.score import QueryCentres
from kvthrift.select import ChunkUnit

N, BUDGET, EVERY = 40, 64, 16


def made(budget: int | str = BUDGET, **options: object) -> Recipe:
    """The method with a made-up table for the tiny llama."""
    recipe = method("triattention", budget=budget, **{"interval": EVERY, **options})  # type: ignore[arg-type]
    assert isinstance(recipe.scorer, QueryCentres)
    return recipe.with_options(scorer=query_centres(2, 4, 16, pinned=recipe.scorer.pinned))


def decoded(recipe: Recipe, steps: int, *, batch: int = 1, prompt: int = N) -> Cache:
    model, ids = tiny("llama"), text(2, prompt + steps)[:batch]
    cache = Cache(model.config, recipe)
    step(cache, ids[:, :prompt])
    for n in range(prompt, prompt + steps):
        step(cache, ids[:, n : n + 1])
    return cache


def step(cache: Cache, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = tiny("llama")(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_made_of_these_parts(shared: bool) -> None:
    recipe = method("triattention", shared=shared)
    assert recipe.layers == (AgreedLayers() if shared else UniformLayers())
    assert (recipe.trigger.prompt, recipe.trigger.every) == (False, 128)
    assert method("triattention", prompt="scored").trigger.prompt
    assert method("triattention", recent=128).protect == Protect(recent=128)
    assert recipe.merge == Evict()


@pytest.mark.parametrize("shared", [True, False])
def test_the_prompt_stays_and_the_budget_is_held_every_so_often(shared: bool) -> None:
    cache, seen = decoded(made(shared=shared), 0), []
    for n in range(100):
        step(cache, text(1, 200)[:, n : n + 1])
        lengths = {len(head) for layer in held(cache) for head in layer}
        assert len(lengths) == 1
        seen.append(lengths.pop())
        for layer in held(cache):
            assert all(head[:N] == list(range(N)) for head in layer)
    assert max(seen) == BUDGET + EVERY
    assert seen[:24] == [N + 1 + n for n in range(24)]  # all of it, while it fits
    cut = [n for n in range(1, 100) if seen[n] < seen[n - 1]]
    assert [seen[n] for n in cut] == [BUDGET + 1] * len(cut)  # cut to the budget, then the step's own
    assert {b - a for a, b in pairwise(cut)} == {EVERY}
    cache.check_integrity()


def test_heads_of_a_number_keep_the_same_in_all_layers_or_each_their_own() -> None:
    model = build(config("llama", num_hidden_layers=3))
    for shared in (True, False):
        recipe = made(shared=shared).with_options(scorer=query_centres(3, 4, 16))
        cache = Cache(model.config, recipe)
        with torch.inference_mode():
            model(input_ids=text(1, N), past_key_values=cache)
            for n in range(60):
                model(input_ids=text(1, 60)[:, n : n + 1], past_key_values=cache)
        layers = held(cache)
        assert layers[0][0] != layers[0][1]
        assert (layers[0] == layers[1] == layers[2]) is shared


def test_what_stays_is_the_best_of_the_answer() -> None:
    recipe = made(shared=False, interval=1000)
    cache = decoded(recipe, 60)
    layer = cache.state.layers[1]
    view = layer.stored_view(cache.state)
    view.rope = cache._facts()[1].rope()
    score = recipe.scorer.score(view)[0]
    wanted = [sorted(row.argsort(descending=True, stable=True)[:BUDGET].tolist()) for row in score]
    layer.since = 1000
    cache.state.layers[0].since = 1000
    step(cache, text(1, 1))
    assert [head[:-1] for head in held(cache)[1]] == wanted
    assert wanted[0] != list(range(BUDGET))


def test_the_serving_form_keeps_the_newest() -> None:
    cache = decoded(made(recent=10), 2 * EVERY)
    step(cache, text(1, 1))
    assert all(head[-11:] == list(range(N + 2 * EVERY - 10, N + 2 * EVERY + 1)) for x in held(cache) for head in x)


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read() -> None:
    model = tiny("llama")
    for budget, recent in ((N - 1, 0), ("50%", 0), (N + 3, 4)):
        cache = Cache(model.config, made(budget, recent=recent))
        with pytest.raises(BudgetError, match=f"always keeps the prompt's {N} tokens.*prompt=scored"):
            step(cache, text(1, N))
        assert cache.report().entries == 0
    step(Cache(model.config, made(N)), text(1, N))
    whole = prefill(model, text(1, N), observe=[made()])
    with pytest.raises(BudgetError, match="always keeps the prompt's"):
        whole.compressed(made(N - 1))
    bytes_ = Cache(model.config, made("10000B"), page=16)
    with pytest.raises(BudgetError, match="always keeps the prompt's 60 tokens"):
        step(bytes_, text(1, 60))


def test_a_scored_prompt_competes_and_is_cut_once_it_is_read() -> None:
    for shared in (True, False):
        cache = decoded(made(prompt="scored", shared=shared), 0, prompt=150)
        assert cache.report().entries == BUDGET * 4
        assert held(cache)[0][0] != list(range(BUDGET))
        for n in range(40):
            step(cache, text(1, 40)[:, n : n + 1])
            assert cache.report().entries <= (BUDGET + EVERY) * 4


def test_a_question_behind_a_context_belongs_to_the_prompt_but_a_short_one_to_the_answer() -> None:
    model = tiny("llama")
    for length, wanted in ((32, N + 32), (31, N)):
        cache = prefill(model, text(1, N), made(120))
        step(cache, text(1, length))
        assert cache.state.prompt is not None
        assert cache.state.prompt.tolist() == [wanted]
        step(cache, text(1, 1))
        step(cache, text(1, 50))  # a turn behind decoded tokens is none
        assert cache.state.prompt.tolist() == [wanted]
    with pytest.raises(BudgetError, match="prompt's 72 tokens"):
        step(prefill(model, text(1, N), made(70)), text(1, 32))


def test_the_prompts_length_follows_crops_forks_rows_and_files(tmp_path: Path) -> None:
    cache = decoded(made(), 30, batch=2)
    fork = cache.fork()
    cache.crop(N - 5)
    assert cache.state.prompt is not None
    assert cache.state.prompt.tolist() == [N - 5, N - 5]
    assert fork.state.prompt is not None
    assert fork.state.prompt.tolist() == [N, N]
    fork.batch_select_indices(torch.tensor([1]))
    fork.save(tmp_path / "x")
    again = kvthrift.load(tmp_path / "x", tiny("llama"))
    assert again.state.prompt is not None
    assert again.state.prompt.tolist() == [N]
    for n in range(20):  # both are cut on the way, the loaded one without having seen a pass before
        one, other = (step(c, text(1, 20)[:, n : n + 1]) for c in (fork, again))
        torch.testing.assert_close(one, other)
    assert held(fork) == held(again)
    assert fork.report().compressions > 0
    cache.crop(-(N - 5))
    assert cache.state.prompt is None


def test_padded_prompts_have_lengths_of_their_own() -> None:
    model, ids = tiny("llama"), text(2, N)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    both = prefill(model, ids, made(), attention_mask=mask)
    assert both.state.prompt is not None
    assert both.state.prompt.tolist() == [N, N - 15]


def test_room_for_everything_changes_no_token() -> None:
    model, ids = tiny("llama"), text(2, N)
    ours = model.generate(ids, past_key_values=Cache(model.config, made(N + 30)), max_new_tokens=30, do_sample=False)
    plain = model.generate(ids, past_key_values=Cache(model.config), max_new_tokens=30, do_sample=False)
    assert torch.equal(ours, plain)


def test_two_calls_of_generate_agree_with_one_by_one_steps() -> None:
    model, ids = tiny("llama"), text(1, N)
    one = kvthrift.generate(model, ids, Cache(model.config, made()), max_new_tokens=60, do_sample=False)
    other = model.generate(ids, past_key_values=Cache(model.config, made()), max_new_tokens=60, do_sample=False)
    assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_that_need_nothing_from_the_host_leave_what_ordinary_steps_do(shared: bool) -> None:
    """As recorded steps do: what was decoded so is cut once it is due."""
    model, ids = tiny("llama"), text(1, 70)
    caches, n = [decoded(made(shared=shared), 0) for _ in range(2)], 0
    while n < 64:
        for cache in caches:
            step(cache, ids[:, n : n + 1])  # an ordinary one, which compresses where that is due
        n += 1
        room = caches[0].state.until_due
        assert room == EVERY - 1
        with torch.inference_mode(), FixedSteps(caches[0].state, room) as steps:
            for m in range(n, n + room):
                model(input_ids=ids[:, m : m + 1], position_ids=steps.positions[:, None], past_key_values=caches[0])
                steps.positions.add_(1)
                steps.taken += 1
        for m in range(n, n + room):
            step(caches[1], ids[:, m : m + 1])
        n += room
        assert held(caches[0]) == held(caches[1])
    assert caches[0].report().compressions > 0


CROSSED = {
    "adaptive heads at a prompt's end": {"heads": AdaptiveHeads(), "layers": UniformLayers()},
    "the whole model's best": {"layers": PoolLayers()},
    "chunks that all layers share": {"unit": ChunkUnit(4, fill=True)},
}


@pytest.mark.parametrize("name", CROSSED)
def test_its_scores_serve_parts_of_other_papers(name: str) -> None:
    recipe = made(prompt="scored", recent=8).with_options(**CROSSED[name], budget=Budget.parse(48))
    cache = prefill(tiny("llama"), text(2, 150), recipe, page=16)
    cache.check_integrity()
    assert cache.report().entries == 48 * 8
    layers = held(cache)
    assert all(head[-8:] == list(range(142, 150)) for layer in layers for head in layer)
    assert (len({len(head) for layer in layers for head in layer}) > 1) is ("chunks" not in name)
    for n in range(30):
        step(cache, text(2, 30)[:, n : n + 1])
    assert cache.report().entries <= (48 + EVERY) * 8
