"""ChunkKV's specification, one test a line of "How to check an implementation"; the worked example is in select."""

from __future__ import annotations

import pytest
from tests.models import text
from tests.reading import deep, held, read
from tests.views import kept, layer_view
from transformers import PreTrainedModel

from kvthrift import Recipe, method
from kvthrift.select import TokenUnit

LAYERS, W = 4, 8


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep(LAYERS)


def token_level(**options: object) -> Recipe:
    """SnapKV with the same scorer, entry by entry."""
    return method("chunkkv", **options).with_options(unit=TokenUnit())


@pytest.mark.parametrize("budget", [9, 30, 64])
def test_chunks_of_one_are_token_level_snapkv_without_pooling(budget: int) -> None:
    view = layer_view(heads=1, group=4, entries=100, window=W)
    wanted = kept(method("snapkv", window=W, pool="none"), view, budget)
    assert kept(method("chunkkv", chunk=1), view, budget) == wanted
    many = layer_view(heads=3, group=2, entries=100, window=W)
    assert kept(method("chunkkv", chunk=1, per_head=True), many, budget) == kept(token_level(), many, budget)


def runs(positions: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive positions as (first, length)."""
    out: list[tuple[int, int]] = []
    for p in positions:
        if out and p == sum(out[-1]):
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((p, 1))
    return out


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("entries", [108, 205])
def test_runs_start_at_multiples_of_the_chunk_and_counts_are_multiples(per_head: bool, entries: int) -> None:
    for seed in range(5):
        view = layer_view(heads=3, group=2, entries=entries, window=W, seed=seed)
        past = entries - W
        found = kept(method("chunkkv", per_head=per_head), view, 47)
        assert per_head or found == [found[0]] * 3
        for positions in found:
            assert positions[-W:] == list(range(past, entries))
            chosen = positions[:-W]
            assert all(first % 10 == 0 for first, _ in runs(chosen))
            tail = any(p >= past - past % 10 for p in chosen)
            assert len(chosen) == (30 if not tail else 20 + past % 10)  # floor((47 - 8) / 10) chunks


def test_fill_keeps_exactly_the_budget() -> None:
    view = layer_view(heads=3, group=2, entries=205, window=W)
    for budget in (8, 12, 18, 47, 204):
        assert [len(p) for p in kept(method("chunkkv", fill=True), view, budget)] == [budget] * 3


def test_uniform_scores_choose_the_lowest_chunks_in_every_layer() -> None:
    for layer in range(4):
        view = layer_view(heads=2, entries=100, window=W, layer=layer)
        view.keys = view.keys * 0
        assert kept(method("chunkkv"), view, 38) == [[*range(30), *range(92, 100)]] * 2


def test_reuse_over_all_layers_gives_identical_positions(model: PreTrainedModel) -> None:
    """N_reuse = L."""
    found = held(read(model, text(1, 150), method("chunkkv", budget=60, reuse=LAYERS)))
    assert found == [found[0]] * LAYERS
    assert found[0] == held(read(model, text(1, 150), method("chunkkv", budget=60)))[0]


def test_reuse_of_one_chooses_for_every_layer(model: PreTrainedModel) -> None:
    """N_reuse = 1; a layer's choice is what it would be by itself."""
    ids = text(1, 150)
    each = held(read(model, ids, method("chunkkv", budget=60)))
    assert len({str(layer) for layer in each}) > 1
    pairs = held(read(model, ids, method("chunkkv", budget=60, reuse=2)))
    assert pairs == [each[0], each[0], each[2], each[2]]


def test_reuse_counts_compressed_layers_only(model: PreTrainedModel) -> None:
    found = held(read(model, text(1, 150), method("chunkkv", budget=60, reuse=3, skip=(0,))))
    assert len(found[0][0]) == 150
    assert found[1] == found[2] == found[3]


def test_sequences_of_a_batch_choose_for_themselves(model: PreTrainedModel) -> None:
    ids = text(2, 150)
    together = read(model, ids, method("chunkkv", budget=60))
    for b in range(2):
        single = held(read(model, ids[b : b + 1], method("chunkkv", budget=60)))
        for layer, found in zip(together.state.layers, single, strict=True):
            assert layer.store is not None
            positions, lengths = layer.store.positions()[b], layer.store.lengths[b]
            assert [positions[h, : lengths[h]].tolist() for h in range(2)] == found
