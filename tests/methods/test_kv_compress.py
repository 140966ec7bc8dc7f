"""KV-Compress's specification, one test a line of "How to check an implementation"; its trend is measured elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import text, tiny
from tests.reading import held, read
from tests.views import eager_rows
from torch import Tensor
from torch.nn import functional as F

from kvthrift import Budget, BudgetError, Cache, OptionError, Recipe, Trigger, generate, method, prefill
from kvthrift.allocate import PageLayers, pages
from kvthrift.allocate.pages import page_costs
from kvthrift.score import AttentionPower, WindowAttention

N, BUDGET = 150, 48


def costs(table: Tensor, page: int) -> list[list[float]]:
    lengths = (table > float("-inf")).sum(dim=-1)
    return [[c for c in row if c < float("inf")] for row in page_costs(table, lengths, page)[0].tolist()]


def shared(tables: list[Tensor], per_head: int, page: int, **options: object) -> list[list[int]]:
    found = PageLayers(page, **options).share(tables, torch.tensor([per_head]))  # type: ignore[arg-type]
    return [counts[0].tolist() for counts in found]


def test_page_costs_of_ten_entries_in_pages_of_four() -> None:
    table = torch.arange(10.0)[None, None]
    assert costs(table, 4) == [[1.0, 5.0, 9.0]]
    assert shared([table], 8, 4) == [[8]]  # one page: 2 go, 2 full pages stay
    assert shared([table], 4, 4) == [[4]]  # two pages: 6 go


def test_of_two_heads_the_cheap_one_loses_all_unless_that_is_ruled_out_or_something_is_protected() -> None:
    cheap, dear = torch.arange(8.0), torch.arange(100.0, 108.0)
    table = torch.stack((cheap, dear))[None]
    assert costs(table, 4) == [[3.0, 7.0], [103.0, 107.0]]
    assert shared([table], 4, 4, empties=True) == [[0, 8]]
    assert shared([table], 4, 4) == [[4, 4]]
    table[0, :, -1] = float("inf")
    assert shared([table], 4, 4, empties=True) == [[4, 4]]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 60), st.integers(0, 5), st.booleans())
def test_what_must_hold_of_every_choice(seed: int, page: int, per_head: int, protected: int, ragged: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    tables = [torch.rand(1, 2, 40, generator=rng) for _ in range(3)]
    for table in tables:
        if ragged:
            lengths = torch.randint(max(protected, 1), 41, (2,), generator=rng)
            table[0, torch.arange(40) >= lengths[:, None]] = float("-inf")
        ends = (table > float("-inf")).sum(dim=-1, keepdim=True)
        steps = torch.arange(40)
        table[(steps >= ends - protected) & (steps < ends)] = float("inf")
    counts = torch.tensor(shared(tables, per_head, page, empties=True))
    size = min(page, per_head)
    rows = torch.cat(tables, dim=1)[0]
    there = (rows > float("-inf")).sum(dim=-1)
    kept, before, after = counts.flatten(), -(-there // size), -(-counts.flatten() // size)
    wanted = max(int(before.sum()) - per_head // size * 6, 0)
    possible = (page_costs(rows[None], there[None], size) < float("inf")).sum()
    assert int((before - after).sum()) == min(wanted, int(possible))
    if wanted <= int(possible):
        assert int(kept.sum()) <= 6 * per_head
    ordered = [row[row > float("-inf")].sort().values for row in rows]
    highest = max((float(x[n - k - 1]) for x, n, k in zip(ordered, there, kept, strict=True) if k < n), default=-1)
    for x, n, k in zip(ordered, there.tolist(), kept.tolist(), strict=True):
        if k == n:
            rest = n - (-(-n // size) - 1) * size
        else:
            assert k % size == 0  # ends on a page boundary
            rest = n - k + size
        if k > 0 and rest <= n:
            assert highest <= float(x[rest - 1])  # no page that stays is cheaper than one that goes


def test_survivors_outscore_what_went() -> None:
    recipe = method("kv_compress", budget=BUDGET)
    assert isinstance(recipe.scorer, AttentionPower)
    model, ids = tiny("gpt_neox"), text(1, N)
    whole = prefill(model, ids, observe=[recipe])
    scores = [layer.store.plane(recipe.scorer.sums.plane)[0] for layer in whole.state.layers if layer.store]
    stays = held(whole.compressed(recipe))
    assert stays == held(read(model, ids, recipe))
    assert len({len(places) for layer in stays for places in layer}) > 2
    for layer, found in zip(stays, scores, strict=True):
        for places, row in zip(layer, found, strict=True):
            gone = [p for p in range(N) if p not in places]
            assert places[-8:] == list(range(N - 8, N))
            assert len(places) % 16 == 0 or not gone
            if gone:
                assert row[places[:-8]].min() >= row[gone].max()


@pytest.mark.parametrize("form", ["window", "full", "plain"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_metrics_are_the_squared_sums_of_eager_rows(name: str, form: str) -> None:
    model, ids = tiny(name), text(2, N)
    options = {"window": {}, "full": {"full": True}, "plain": {"squared": False}}[form]
    recipe = method("kv_compress", budget=BUDGET, **options)  # type: ignore[arg-type]
    scorer = recipe.scorer
    assert isinstance(scorer, AttentionPower)
    window = N if form == "full" else 8
    both = prefill(model, ids, observe=[recipe, Recipe("window", WindowAttention(window))])
    for layer in both.state.layers:
        assert layer.store is not None
        assert layer.window is not None
        assert layer.window.queries is not None
        assert layer.window.positions is not None
        rows = eager_rows(
            layer.window.queries[:1], layer.store.read().keys[:1], q_positions=layer.window.positions[:1],
            k_positions=layer.store.positions()[:1], lengths=torch.full((1, 4), N), scale=layer.scale,
        )  # fmt: skip
        near = layer.window.positions[0][:, None] - torch.arange(N) < (10 if form == "full" else 0)
        sums = (rows if form == "plain" else rows.square()).masked_fill(near, 0.0).sum(dim=3).float()
        if form != "full":
            sums = F.max_pool1d(sums.flatten(1, 2), 7, 1, 3).view(sums.shape)
        torch.testing.assert_close(
            layer.store.plane(scorer.sums.plane)[:1], sums.sum(dim=2), atol=1e-5, rtol=1e-4
        )  # fmt: skip


def test_averages_are_over_the_queries_that_counted() -> None:
    model, ids = tiny("llama"), text(1, N)
    recipe = method("kv_compress", budget=BUDGET, full=True, average=True, every=1000)
    cache = prefill(model, ids, observe=[recipe, Recipe("window", WindowAttention(N))])
    for layer in cache.state.layers:
        assert layer.store is not None
        assert layer.window is not None
        assert layer.window.queries is not None
        assert layer.window.positions is not None
        rows = eager_rows(
            layer.window.queries, layer.store.read().keys, q_positions=layer.window.positions,
            k_positions=layer.store.positions(), lengths=torch.full((1, 2), N), scale=layer.scale,
        ).square()  # fmt: skip
        counts = torch.arange(N)[:, None] - torch.arange(N) >= 10  # [W, T]
        wanted = rows.masked_fill(~counts, 0.0).sum(dim=(2, 3)) / counts.sum(dim=0).clamp(min=1)
        found = recipe.scorer.score(layer.stored_view(cache.state))
        torch.testing.assert_close(found, wanted.float(), atol=1e-6, rtol=1e-4)
    plain = method("kv_compress", budget=BUDGET, full=True)
    assert held(read(model, ids, plain)) != held(read(model, ids, recipe))
    with pytest.raises(OptionError, match="average=True needs window=0: over the same 8 queries"):
        method("kv_compress", average=True)


def test_sinks_and_a_protected_window_of_its_own() -> None:
    recipe = method("kv_compress", budget=BUDGET, sinks=3, protected=20)
    for layer in held(read(tiny("llama"), text(1, N), recipe)):
        for places in layer:
            assert {*range(3), *range(N - 20, N)} <= set(places)
    assert method("kv_compress", full=True).protect.recent == 32
    with pytest.raises(BudgetError, match="always keeps 3 sinks and 20 recent"):
        Cache(tiny("llama").config, recipe.with_options(budget=Budget.parse(22)))


def test_laying_entries_out_anew_changes_no_output() -> None:
    model, ids = tiny("llama"), text(1, N)
    caches = [prefill(model, ids) for _ in range(2)]
    for layer in caches[0].state.layers:
        store = layer.store
        assert store is not None
        view, valid = store.read(), store.valid()
        store.replace(view.keys[valid], view.values[valid], store.positions()[valid], store.lengths)
    with torch.inference_mode():
        ours, theirs = (model(input_ids=ids[:, :3], past_key_values=c).logits for c in caches)
    torch.testing.assert_close(ours, theirs)


def test_a_large_budget_evicts_nothing() -> None:
    model, ids = tiny("llama"), text(1, N)
    past, plain = read(model, ids, method("kv_compress", budget=N)), read(model, ids, method("full"))
    assert past.report().entries == past.report().full_entries
    with torch.inference_mode():
        assert torch.equal(*(model(input_ids=ids[:, :1], past_key_values=c).logits for c in (past, plain)))


@pytest.mark.parametrize(("budget", "rounding", "most"), [(48, "down", 48), (50, "down", 48), (50, "up", 64)])
def test_a_budget_is_rounded_to_pages(budget: int, rounding: str, most: int) -> None:
    past = read(tiny("gpt_neox"), text(2, N), method("kv_compress", budget=budget, rounding=rounding))
    assert past.report().entries <= most * 3 * 4 * 2
    assert past.report().entries > (most - 16) * 3 * 4 * 2
    past.check_integrity()


def test_freed_pages_are_memory() -> None:
    """With the store's page the same, what is held is whole pages and what goes with them."""
    past = prefill(tiny("llama"), text(1, N), "kv_compress", budget=BUDGET, page=16)
    for layer in past.state.layers:
        assert layer.store is not None
        assert layer.store.pool.total == int((layer.store.lengths // 16).sum())
        assert layer.store.pool.free == 0


def test_decode_steps_add_theirs_and_the_newest_starts_at_nothing() -> None:
    model, ids = tiny("llama"), text(1, N)
    recipe = method("kv_compress", budget=BUDGET).with_options(trigger=method("tova", every=1000).trigger)
    assert isinstance(recipe.scorer, AttentionPower)
    past = read(model, ids, recipe)
    name = recipe.scorer.sums.plane
    stores = [layer.store for layer in past.state.layers if layer.store]
    before = [store.plane(name).clone() for store in stores]
    lengths = [store.lengths.copy() for store in stores]
    with torch.inference_mode():
        model(input_ids=ids[:, :1], past_key_values=past)
    for store, old, count in zip(stores, before, lengths, strict=True):
        for h, n in enumerate(count[0]):
            more = store.plane(name)[0, h, : n + 1] - F.pad(old[0, h, :n], (0, 1))
            assert (more > 0).all()
            assert 0 < float(more.sum()) <= 2  # squares of a row in each of two query heads


def test_continual_compression_holds_the_budget_at_every_step() -> None:
    model = tiny("llama")
    past = Cache(model.config, "kv_compress", budget=BUDGET, continual=True)
    with torch.inference_mode():
        model(input_ids=text(2, N), past_key_values=past)
        for step in range(20):
            model(input_ids=text(2, 1, seed=step), past_key_values=past)
            assert past.report().entries <= (BUDGET + 1) * 2 * 2 * 2
    past.check_integrity()
    assert past.report().compressions > 4


def test_sequences_are_compressed_for_themselves() -> None:
    model, ids = tiny("llama"), text(2, N)
    together = read(model, ids, method("kv_compress", budget=BUDGET))
    for b in range(2):
        alone = read(model, ids[b : b + 1], method("kv_compress", budget=BUDGET))
        for ours, theirs in zip(together.state.layers, alone.state.layers, strict=True):
            assert ours.store is not None
            assert theirs.store is not None
            assert ours.store.lengths[b].tolist() == theirs.store.lengths[0].tolist()


@pytest.mark.parametrize("even", ["layers", "heads"])
@pytest.mark.parametrize("seed", range(3))
def test_even_forms_free_as_many_pages_in_each(even: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tables = [torch.rand(1, 2, 40, generator=rng) * (1 + 5 * n) for n in range(3)]  # the first layers are cheap
    free = torch.tensor(shared(tables, 16, 8))
    found = torch.tensor(shared(tables, 16, 8, even=even))
    assert int(found.sum()) == int(free.sum()) == 3 * 2 * 16
    assert free.sum(dim=1).tolist() != [32] * 3  # or this shows nothing
    assert (found if even == "heads" else found.sum(dim=1)).unique().tolist() == [16 if even == "heads" else 32]
    odd = torch.tensor(shared(tables, 20, 8, even=even, rounding="up", empties=True))
    assert int(odd.sum()) == 6 * 24


def test_even_frees_elsewhere_what_protected_pages_cannot() -> None:
    tables = [torch.full((1, 1, 16), float("inf")), torch.arange(16.0)[None, None]]
    assert shared(tables, 8, 4, even="layers", empties=True) == [[16], [0]]
    assert shared(tables, 12, 4, even="layers") == [[16], [8]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 500), st.booleans())
def test_how_many_are_sorted_at_a_time_changes_nothing(seed: int, ranked: int, even: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    tables = [(8 * torch.rand(2, 3, 40, generator=rng)).round() for _ in range(3)]  # with ties
    options = {"even": "layers"} if even else {}
    both = [
        PageLayers(8, ranked=most, **options).share(tables, torch.tensor([16, 24]))  # type: ignore[arg-type]
        for most in (ranked, 5_000_000)
    ]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_no_more_is_sorted_at_a_time_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = pages.page_costs

    def watched(table: Tensor, lengths: Tensor, page: int) -> Tensor:
        seen.append(table.numel())
        return plain(table, lengths, page)

    monkeypatch.setattr(pages, "page_costs", watched)
    PageLayers(8, ranked=100).share([torch.rand(2, 3, 40) for _ in range(3)], torch.tensor([16, 16]))
    assert seen == [80, 80, 80, 80, 40] * 2


def test_a_recipe_takes_its_further_forms() -> None:
    recipe = method("kv_compress", even="layers", ranked=100, budget=BUDGET)
    assert recipe.layers == PageLayers(16, even="layers", ranked=100)
    lengths = [sum(map(len, layer)) for layer in held(read(tiny("gpt_neox"), text(1, N), recipe))]
    assert lengths == [4 * BUDGET] * 3
    with pytest.raises(OptionError, match="ranked=0"):
        method("kv_compress", ranked=0)
    with pytest.raises(OptionError, match="even"):
        method("kv_compress", even="odd")


def test_a_buffer_of_any_size_leaves_near_queries_out_decoded_ones_too() -> None:
    model, ids = tiny("llama"), text(1, N)
    recipe = method("kv_compress", budget=BUDGET, buffer=5, kernel=1, every=1000)
    assert isinstance(recipe.scorer, AttentionPower)
    assert recipe.scorer.buffer == 5
    assert [method("kv_compress", full=x).scorer.buffer for x in (False, True)] == [0, 10]  # type: ignore[attr-defined]
    assert method("kv_compress", full=True, buffer=0).scorer.buffer == 0  # type: ignore[attr-defined]
    past = Cache(model.config, recipe, observe=[recipe])
    whole = Cache(model.config, observe=[recipe])
    with torch.inference_mode():
        for cache in (past, whole):
            model(input_ids=ids, past_key_values=cache)
    for layer in whole.state.layers:
        assert layer.store is not None
        sums = layer.store.plane(recipe.scorer.sums.plane)[0]
        assert (sums[:, -5:] == 0).all()  # the last query is fewer than 5 positions behind them
        assert (sums[:, :-12] > 0).all()
    store = past.state.layers[0].store
    assert store is not None
    name, count = recipe.scorer.sums.plane, store.lengths[0]
    before = [store.plane(name)[0, h, :n].clone() for h, n in enumerate(count)]
    with torch.inference_mode():
        model(input_ids=ids[:, :1], past_key_values=past)
    for h, n in enumerate(count):
        more = store.plane(name)[0, h, :n] - before[h]
        near = store.positions()[0, h, :n] > N - 5
        assert (more[near] == 0).all()
        assert (more[~near] > 0).all()


@pytest.mark.parametrize(("batch", "steps"), [(1, 24), (2, 12), (5, 5)])
def test_the_limit_of_new_tokens_counts_those_of_all_sequences(batch: int, steps: int) -> None:
    model = tiny("llama")
    past = Cache(model.config, method("kv_compress", budget=BUDGET, limit=24))
    with torch.inference_mode():
        model(input_ids=text(5, N)[:batch], past_key_values=past)
        most = [past.report().entries]
        for n in range(3 * steps + 1):
            model(input_ids=text(5, 1, seed=n)[:batch], past_key_values=past)
            most.append(past.report().entries)
    cuts = [n for n in range(1, len(most)) if most[n] < most[n - 1]]
    assert cuts == [steps + 1, 2 * steps + 1, 3 * steps + 1]  # at the start of the step that comes behind so many
    assert max(most) <= batch * 4 * (BUDGET + steps)


def test_a_limit_goes_on_within_generate_and_is_checked() -> None:
    model, ids = tiny("llama"), text(2, N)
    recipe = method("kv_compress", budget=BUDGET, limit=16)
    caches = [Cache(model.config, recipe) for _ in range(2)]
    one = generate(model, ids, caches[0], max_new_tokens=30, do_sample=False)
    other = model.generate(ids, past_key_values=caches[1], max_new_tokens=30, do_sample=False)
    assert torch.equal(one, other)
    assert caches[0].report().entries <= (BUDGET + 8) * 8
    assert Recipe.from_plain(recipe.plain()) == recipe
    with pytest.raises(OptionError, match="never matters with continual"):
        method("kv_compress", limit=3, continual=True)
    with pytest.raises(OptionError, match="every is not set"):
        Trigger(together=True)
