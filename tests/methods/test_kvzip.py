"""KVzip's specification, one test a line of "How to check an implementation"; its anchor is measured elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import text, tiny
from tests.reading import held
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvthrift import Cache, OptionError, Recipe, method, prefill
from kvthrift.allocate import PoolLayers
from kvthrift.core import SecondPass
from kvthrift.score import SecondPassAttention, WindowAttention

N, SINKS = 150, 4
FIRST, LATER, REPLY = (7, 8, 9), (11, 12), (13,)


@torch.inference_mode()
def looked(model: PreTrainedModel, ids: Tensor, *recipes: Recipe) -> Cache:
    """The whole context, with what a second pass found."""
    return prefill(model, ids, observe=list(recipes))


def slow(model: PreTrainedModel, ids: Tensor, fed: Tensor, start: int, stop: int) -> list[Tensor]:
    """Scores ``[B, H, stop - start]`` of each layer, from all attention rows of ``fed`` behind the context."""
    both = torch.cat((ids, fed), dim=1)
    count = fed.shape[1]
    cache = Cache(model.config, observe=[Recipe("window", WindowAttention(count))])
    with torch.inference_mode():
        model(input_ids=both, past_key_values=cache)
    out = []
    for layer in cache.state.layers:
        assert layer.window is not None
        assert layer.store is not None
        assert layer.window.queries is not None
        q, k = layer.window.queries.double(), layer.store.read().keys.double()
        b, h, t, _ = k.shape
        seen = [*range(SINKS), *range(start, stop), *range(ids.shape[1], t)]
        logits = q.reshape(b, h, -1, count, q.shape[-1]) @ k[:, :, None, seen].transpose(-1, -2) * layer.scale
        ahead = torch.arange(count)[None, :] > torch.arange(count)[:, None]
        logits[..., -count:] = logits[..., -count:].masked_fill(ahead, float("-inf"))
        rows = logits.softmax(dim=-1)[..., SINKS : SINKS + stop - start]
        out.append(rows.amax(dim=(2, 3)).float())
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("chunk", [2000, 146, 60, 50])
def test_scores_are_the_most_attention_within_the_chunk_and_the_repetition(name: str, chunk: int) -> None:
    model, ids = tiny(name), text(2, N)
    recipe = method("kvzip", repeat=chunk, first=FIRST, later=LATER, reply=REPLY, budget=40)
    assert isinstance(recipe.scorer, SecondPassAttention)
    found = [layer.second_pass[recipe.scorer.look] for layer in looked(model, ids, recipe).state.layers]
    for start in range(SINKS, N, chunk):
        stop = min(start + chunk, N)
        said = torch.tensor([FIRST if start == SINKS else LATER] * 2)
        quote = ids[:, start - 8 : start] if start > SINKS else ids[:, :0]
        fed = torch.cat((said, quote, torch.tensor([REPLY] * 2), ids[:, start:stop]), dim=1)
        for ours, theirs in zip(found, slow(model, ids, fed, start, stop), strict=True):
            torch.testing.assert_close(ours[:, :, start:stop], theirs, atol=1e-5, rtol=1e-4)


def test_rho_1_is_the_full_cache() -> None:
    model, ids, more = tiny("llama"), text(1, N), text(1, 3)
    for budget in (N, "100%", 4 * N):
        caches = [prefill(model, ids, "kvzip", budget=budget), prefill(model, ids)]
        with torch.inference_mode():
            for n in range(3):
                ours, whole = (model(input_ids=more[:, n : n + 1], past_key_values=c).logits for c in caches)
                assert torch.equal(ours, whole)


def test_of_ten_distinct_scores_at_30_percent_the_published_rule_keeps_2_and_the_other_3() -> None:
    scores = torch.tensor([[[3.0, 9, 1, 7, 5, 0, 8, 2, 6, 4]]])
    assert [x.tolist() for x in PoolLayers(strict=True).share([scores], torch.tensor([3]))] == [[[2]]]
    assert [x.tolist() for x in PoolLayers().share([scores], torch.tensor([3]))] == [[[3]]]
    halves = [scores[..., :5], scores[..., 5:]]  # the same ten in two layers: 9 and 7 in one, 8 in the other
    assert [x.tolist() for x in PoolLayers().share(halves, torch.tensor([1]))] == [[[1]], [[1]]]
    assert [x.tolist() for x in PoolLayers().share(halves, torch.tensor([2]))] == [[[2]], [[2]]]


@pytest.mark.parametrize("share", ["20%", "30%", "55%"])
def test_kept_pairs_over_layers_and_heads_are_the_share_asked_for(share: str) -> None:
    model, ids = tiny("gpt_neox"), text(2, N)
    pairs = 2 * 3 * 4  # sequences, layers, heads
    asked = int(N * int(share[:-1]) / 100) * pairs
    assert prefill(model, ids, "kvzip", budget=share).report().entries == asked
    fewer = prefill(model, ids, "kvzip", budget=share, budgets="threshold").report().entries
    assert asked - 2 * 2 <= fewer <= asked - 2  # one fewer a sequence, and ties
    uniform = prefill(model, ids, "kvzip", budget=share, budgets="uniform")
    assert {row.fewest for row in uniform.report().layers} == {asked // pairs}
    assert {row.most for row in uniform.report().layers} == {asked // pairs}


def test_what_stays_are_the_highest_scores_of_the_whole_model() -> None:
    model, ids = tiny("gpt_neox"), text(1, N)
    recipe = method("kvzip", repeat=60, budget=40)
    whole = looked(model, ids, recipe)
    assert isinstance(recipe.scorer, SecondPassAttention)
    scores = [layer.second_pass[recipe.scorer.look][0].clone() for layer in whole.state.layers]
    stays = held(whole.compressed(recipe))
    table = torch.stack(scores)  # [L, H, T]
    mask = torch.zeros_like(table, dtype=torch.bool)
    for n, layer in enumerate(stays):
        for h, places in enumerate(layer):
            mask[n, h, places] = True
    free = torch.arange(N) >= SINKS
    assert mask[..., ~free].all()
    assert table[..., free][mask[..., free]].min() >= table[..., free][~mask[..., free]].max()
    assert len({len(places) for layer in stays for places in layer}) > 3  # heads differ, or this shows little


def test_scores_lie_above_0_and_up_to_1() -> None:
    recipe = method("kvzip", repeat=60, budget=40)
    assert isinstance(recipe.scorer, SecondPassAttention)
    for layer in looked(tiny("llama"), text(2, N), recipe).state.layers:
        scores = layer.second_pass[recipe.scorer.look]
        assert (scores[..., :SINKS] == 0).all()
        assert (scores[..., SINKS:] > 0).all()
        assert (scores <= 1).all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
@torch.inference_mode()
def test_scoring_leaves_length_and_next_logits_as_they_were(name: str) -> None:
    model, ids = tiny(name), text(2, N)
    caches = [looked(model, ids, method("kvzip", repeat=40), method("kvcompose")), prefill(model, ids)]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == N
    for _ in range(3):
        ours, plain = (model(input_ids=ids[:, :1], past_key_values=c).logits for c in caches)
        assert torch.equal(ours, plain)
    caches[0].check_integrity()


@torch.inference_mode()
def test_two_questions_see_the_same_kept_set() -> None:
    model, ids = tiny("llama"), text(1, N)
    context = prefill(model, ids, "kvzip", budget=40)
    before = held(context)
    after = []
    for seed in (1, 2):
        fork = context.fork()
        model(input_ids=text(1, 40, seed=seed), past_key_values=fork)
        after.append([[[p for p in head if p < N] for head in layer] for layer in held(fork)])
    assert before == after[0] == after[1] == held(context)


def test_a_context_shorter_than_a_chunk_is_one_pass() -> None:
    ids = text(1, N)
    short, long = (held(prefill(tiny("llama"), ids, "kvzip", budget=40, repeat=n)) for n in (N - SINKS, 2000))
    assert short == long


def test_a_context_of_nothing_but_the_system_prompt_keeps_it() -> None:
    context = prefill(tiny("llama"), text(1, 20), "kvzip", sinks=30, budget=30)
    assert context.report().entries == context.report().full_entries


def test_words_are_part_of_what_is_gathered() -> None:
    """Two recipes that ask in other words do not share a pass."""
    model, ids = tiny("llama"), text(1, N)
    plain, asked = method("kvzip", budget=40), method("kvzip", budget=40, first=FIRST)
    whole = looked(model, ids, plain, asked)
    for recipe in (plain, asked):
        assert held(whole.compressed(recipe)) == held(prefill(model, ids, recipe))
    passes = {x for layer in whole.state.layers for x in layer.second_pass}
    assert passes == {SecondPass(sinks=4), SecondPass(sinks=4, first=FIRST)}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_repetition_that_sees_its_chunk_alone(name: str) -> None:
    """What a model says of sinks, chunk and repetition by themselves, at the positions they have, is what is scored."""
    model, eager, sinks, chunk = tiny(name), tiny(name, "eager"), 4, 40
    ids = text(1, sinks + 2 * chunk)
    recipe = method("kvzip", budget=50, repeat=chunk, sees="chunk", sinks=sinks, first=(5,), later=(6,), overlap=0)
    cache = looked(model, ids, recipe)
    for number, word in ((0, 5), (1, 6)):
        first = sinks + number * chunk
        place = torch.cat((torch.arange(sinks), torch.arange(first, first + chunk)))
        again = torch.cat((torch.tensor([[word]]), ids[:, first : first + chunk]), dim=1)
        wanted = _rows_behind(eager, cache, place, again, ids.shape[1])
        for layer, rows in zip(cache.state.layers, wanted, strict=True):
            found = layer.second_pass[recipe.scorer.look][0, :, first : first + chunk]
            best = rows[0, :, :, sinks : sinks + chunk].amax(dim=1)  # [HG, chunk]
            torch.testing.assert_close(found, best.view(len(found), -1, chunk).amax(dim=1), rtol=1e-3, atol=1e-5)


def _rows_behind(eager: Any, cache: Any, place: Any, again: Any, length: int) -> Any:
    """Attention of ``again`` over the entries at ``place`` of a cache and itself."""
    past = DynamicCache(config=eager.config)
    for layer in cache.state.layers:
        read = layer.store.read()
        past.update(read.keys[:, :, place].clone(), read.values[:, :, place].clone(), layer.number)
    positions = (length + torch.arange(again.shape[1]))[None]
    with torch.inference_mode():
        return eager(input_ids=again, past_key_values=past, position_ids=positions, output_attentions=True).attentions


def test_seeing_the_chunk_alone_needs_scores_among_the_chunk() -> None:
    with pytest.raises(OptionError, match="no share of the softmax"):
        SecondPassAttention(among="all", sees="chunk")


def test_one_chunk_that_is_the_whole_context_is_seen_alike() -> None:
    kept = [
        held(prefill(tiny("llama"), text(1, 60), method("kvzip", budget=20, sees=sees))) for sees in ("all", "chunk")
    ]
    assert kept[0] == kept[1]
