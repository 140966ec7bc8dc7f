"""KVCompose's specification, one test a line of "How to check an implementation"; its trend is measured elsewhere."""

from __future__ import annotations

import pytest
import torch
from tests.models import text, tiny
from tests.reading import held
from tests.views import layer_view
from torch import Tensor

from kvthrift import Cache, Recipe, method, prefill
from kvthrift.allocate import CompositeLayers
from kvthrift.allocate.joint import winners
from kvthrift.core import LayerView
from kvthrift.score import SecondPassAttention, WindowAttention

N = 120
S0 = torch.tensor([[[3.0, 1, 0], [0, 1, 3]]])
S1 = torch.full((1, 2, 3), 2.0)


def share(layers: CompositeLayers, scores: list[Tensor], kept: int) -> list[int]:
    return [int(n) for n in layers.share(scores, torch.tensor([kept]))]


def test_composites_of_the_worked_example_and_three_of_six() -> None:
    assert CompositeLayers.offers(S0).tolist() == [[3, 1, 0]]
    assert CompositeLayers.offers(S1).tolist() == [[2, 2, 2]]
    board = torch.stack((CompositeLayers.offers(S0), CompositeLayers.offers(S1)), dim=1)
    assert winners(board, torch.tensor([3])).tolist() == [[1, 2]]
    assert share(CompositeLayers(first_most=False), [S0, S1], 2) == [1, 3]  # 3, then 2, 2, 2
    order = S0[0].argsort(dim=-1, descending=True, stable=True)
    assert order[:, 0].tolist() == [0, 2]  # head 0 keeps token 0, head 1 token 2, in the same slot


def test_composites_may_be_the_largest_of_the_heads() -> None:
    uneven = torch.tensor([[[9.0, 0, 0], [0, 1, 0]]])
    assert CompositeLayers.offers(uneven, "max").tolist() == [[9, 0, 0]]
    assert CompositeLayers.offers(uneven).tolist() == [[5, 0, 0]]
    tables = [torch.tensor([[[9.0, 4, 0], [0, 0, 0]]]), torch.full((1, 2, 3), 3.0)]
    assert share(CompositeLayers(False, joined="max"), tables, 2) == [2, 2]  # 9, 4 against 3, 3
    assert share(CompositeLayers(False), tables, 2) == [1, 3]  # 4.5, 2 against 3, 3
    assert method("kvcompose", composite="max").layers == CompositeLayers(joined="max")


def test_the_first_layer_keeps_the_most() -> None:
    offers = torch.tensor([[[3.0, 2, 2], [2, 2, 2]]])  # the first layer's are the most of both
    for room, counts in ((3, [2, 1]), (4, [2, 2]), (5, [3, 2])):  # ties go by rank, then by layer
        assert winners(offers, torch.tensor([room])).tolist() == [counts]
    assert share(CompositeLayers(), [S0, S1], 2) == [2, 2]


def test_the_mean_over_heads_is_added_once() -> None:
    scorer = method("kvcompose").scorer
    assert isinstance(scorer, SecondPassAttention)
    view = layer_view(heads=2, entries=3)
    view.second_pass = {scorer.look: S0}
    assert scorer.score(view).tolist() == [[[4.5, 2.0, 1.5], [1.5, 2.0, 4.5]]]
    plain = method("kvcompose", across_heads=False).scorer
    assert torch.equal(plain.score(view), S0)


def test_the_value_norm_multiplies_before_the_mean_is_added() -> None:
    scorer = method("kvcompose", value_norm=True).scorer
    assert isinstance(scorer, SecondPassAttention)
    view: LayerView = layer_view(heads=2, entries=3)
    view.second_pass = {scorer.look: S0}
    scaled = S0 * view.values.norm(dim=-1)
    torch.testing.assert_close(scorer.score(view), scaled + scaled.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_nothing_is_removed_at_ratio_0_and_the_counts_add_up(name: str) -> None:
    model, ids = tiny(name), text(1, N)
    layers = model.config.num_hidden_layers
    whole = prefill(model, ids, "kvcompose", budget="100%")
    assert whole.report().entries == whole.report().full_entries
    with torch.inference_mode():
        ours, theirs = (model(input_ids=ids[:, :1], past_key_values=c).logits for c in (whole, prefill(model, ids)))
    assert torch.equal(ours, theirs)
    for budget in (1, 7, 30, 119):
        rows = prefill(model, ids, "kvcompose", budget=budget).report().layers
        assert all(row.fewest == row.most >= 1 for row in rows)  # all heads of a layer alike
        assert sum(row.most for row in rows) == layers * budget
        assert rows[0].most == max(row.most for row in rows)


@pytest.mark.parametrize("structured", [True, False])
def test_entries_are_the_heads_own_best_in_position_order(structured: bool) -> None:
    model, ids = tiny("gpt_neox"), text(1, N)
    recipe = method("kvcompose", budget=30, structured=structured)
    assert isinstance(recipe.scorer, SecondPassAttention)
    whole = prefill(model, ids, observe=[recipe])
    scores = [layer.second_pass[recipe.scorer.look][0] for layer in whole.state.layers]
    stays = held(whole.compressed(recipe))
    assert sum(len(places) for layer in stays for places in layer) == 30 * 3 * 4
    assert structured == all(len({len(places) for places in layer}) == 1 for layer in stays)
    for layer, found in zip(stays, scores, strict=True):
        joined = found + found.mean(dim=0)
        for h, places in enumerate(layer):
            assert places == sorted(joined[h].argsort(descending=True, stable=True)[: len(places)].tolist())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scores_are_the_second_passs_attention_alone(name: str) -> None:
    """Every query of the probe over both copies; the first reading's attention plays no part."""
    model, ids = tiny(name), text(2, N)
    recipe = method("kvcompose", budget=30)
    assert isinstance(recipe.scorer, SecondPassAttention)
    found = [x.second_pass[recipe.scorer.look] for x in prefill(model, ids, observe=[recipe]).state.layers]
    cache = Cache(model.config, observe=[Recipe("window", WindowAttention(N))])
    with torch.inference_mode():
        model(input_ids=torch.cat((ids, ids), dim=1), past_key_values=cache)
    for layer, ours in zip(cache.state.layers, found, strict=True):
        assert layer.window is not None
        assert layer.window.queries is not None
        assert layer.store is not None
        q, k = layer.window.queries.double(), layer.store.read().keys.double()
        b, h, t, _ = k.shape
        logits = q.reshape(b, h, -1, N, q.shape[-1]) @ k[:, :, None].transpose(-1, -2) * layer.scale
        ahead = torch.arange(t)[None, :] > torch.arange(N, t)[:, None]
        rows = logits.masked_fill(ahead, float("-inf")).softmax(dim=-1)[..., :N]
        torch.testing.assert_close(ours, rows.amax(dim=3).mean(dim=2).float(), atol=1e-5, rtol=1e-4)
