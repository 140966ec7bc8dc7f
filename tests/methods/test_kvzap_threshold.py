"""KVzap's published rule: what is foretold to score less than a threshold goes, and the budget is what comes out."""

from __future__ import annotations

import math

import pytest
import torch
from tests.fitted import fitted
from tests.models import text, tiny
from tests.reading import held, read
from torch import Tensor

from kvthrift import BudgetError, Cache, OptionError, Recipe, generate, method, prefill
from kvthrift.calibrate import load_named
from kvthrift.calibrate.surrogate import KIND

N, WINDOW = 150, 8


def rule(tau: float, **options: object) -> Recipe:
    return fitted(method("kvzap", budgets="threshold", threshold=tau, window=WINDOW, **options))


def foretold(ids: Tensor) -> list[Tensor]:
    """Logarithms of the scores ``[H, T]`` of every layer."""
    recipe = rule(0.0)
    whole = prefill(tiny("llama"), ids, observe=[recipe])
    found = []
    for number, layer in enumerate(whole.state.layers):
        view = layer.stored_view(whole.state)
        view.rope, view.layer = whole._facts()[number].rope(), number
        found.append(recipe.scorer.score(view)[0].log())
    return found


def wanted(scores: list[Tensor], tau: float, end: int) -> list[list[list[int]]]:
    """What stays of ``end`` tokens: high scores, and the newest."""
    return [[[n for n in range(end) if float(row[n]) >= tau or n >= end - WINDOW] for row in layer] for layer in scores]


@pytest.mark.parametrize("tau", [-1.0, 0.0, 1.5])
def test_what_is_foretold_to_score_enough_stays(tau: float) -> None:
    ids = text(1, N)
    cache = read(tiny("llama"), ids, rule(tau))
    assert held(cache) == wanted(foretold(ids), tau, N)
    assert len({len(head) for layer in held(cache) for head in layer}) > 2
    cache.check_integrity()
    assert "as much as is needed" in cache.report().recipe


def test_decoding_drops_what_leaves_the_window() -> None:
    ids, tau, steps = text(1, N + 30), 0.5, 30
    model = tiny("llama")
    cache = read(model, ids[:, :N], rule(tau).with_options(trigger=method("tova", every=1).trigger))
    with torch.inference_mode():
        for n in range(N, N + steps):
            model(input_ids=ids[:, n : n + 1], past_key_values=cache)
    cache.check_integrity()
    prompt = foretold(ids[:, :N])
    for layer, scores in zip(held(cache), prompt, strict=True):
        for ours, row in zip(layer, scores, strict=True):
            assert [p for p in ours if p < N] == [p for p in range(N) if float(row[p]) >= tau]
            # cut at the start of a pass: its own token is not yet among the newest
            assert ours[-WINDOW - 1 :] == list(range(N + steps - WINDOW - 1, N + steps))
            assert len([p for p in ours if p >= N]) < steps


def test_no_threshold_is_the_full_cache_to_the_token() -> None:
    model, ids = tiny("llama"), text(1, N)
    made = [
        generate(model, ids, Cache(model.config, recipe), max_new_tokens=8, do_sample=False).tolist()
        for recipe in (rule(-math.inf), method("full"))
    ]
    assert made[0] == made[1]
    report = read(model, ids, rule(-math.inf)).report()
    assert report.entries == report.full_entries


def test_a_threshold_that_nothing_reaches_leaves_the_window() -> None:
    cache = read(tiny("llama"), text(1, N), rule(math.inf))
    assert held(cache) == [[list(range(N - WINDOW, N))] * 2] * 2
    alone = read(tiny("llama"), text(1, N), rule(math.inf).with_options(protect=method("knorm").protect))
    assert all(len(head) == 1 for layer in held(alone) for head in layer)


def test_higher_keeps_less_and_a_budget_is_an_upper_limit() -> None:
    ids = text(1, N)
    counts = [read(tiny("llama"), ids, rule(tau)).report().entries for tau in (-2.0, 0.0, 2.0)]
    assert counts[0] > counts[1] > counts[2]
    free = held(read(tiny("llama"), ids, rule(0.0)))
    capped = held(read(tiny("llama"), ids, rule(0.0, budget=30)))
    for whole, cut in zip(free, capped, strict=True):
        room = 2 * min(30, -(-sum(map(len, whole)) // 2))
        assert sum(map(len, cut)) == min(room, sum(map(len, whole)))
        assert all(set(few) <= set(many) for few, many in zip(cut, whole, strict=True))


def test_sequences_of_a_batch_find_their_own() -> None:
    model, ids = tiny("llama"), text(3, N)
    together = read(model, ids, rule(0.5))
    for b in range(3):
        alone = read(model, ids[b : b + 1], rule(0.5))
        for ours, theirs in zip(together.state.layers, alone.state.layers, strict=True):
            assert ours.store is not None
            assert theirs.store is not None
            assert ours.store.lengths[b].tolist() == theirs.store.lengths[0].tolist()


def test_a_recipe_holds_its_threshold() -> None:
    recipe = rule(-4.5)
    assert Recipe.from_plain(recipe.plain()) == recipe
    assert "threshold(log_score=-4.5)" in str(recipe)


def test_two_tables_are_shipped_for_the_embedded_model() -> None:
    found = [load_named(name, method="kvzap", kind=KIND) for name in ("smollm2", "smollm2-plus")]
    assert [table.meta.provenance.get("target") for table in found] == [None, "kvzip+"]
    assert found[0].meta.model == found[1].meta.model
    recipes = [method("kvzap", calibration=name, budgets="threshold") for name in ("smollm2", "smollm2-plus")]
    assert recipes[0].scorer != recipes[1].scorer
    assert all(table.tensors["explained"].mean() > 0.5 for table in found)


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="threshold=nan must be a number"):
        method("kvzap", threshold=float("nan"))
    with pytest.raises(OptionError, match="threshold='low'"):
        method("kvzap", budgets="threshold", threshold="low")
    with pytest.raises(BudgetError, match="always keeps 0 sinks and 8 recent"):
        read(tiny("llama"), text(1, N), rule(0.0, budget=4))
