"""H2O with products in 8 bits: nearly the entries of exact products, and the same life of a cache."""

from __future__ import annotations

import pytest
import torch
from tests.models import text, tiny
from tests.reading import held, read
from tests.views import layer_view, with_signals
from torch import Tensor

from kvthrift import Cache, Recipe, method, prefill
from kvthrift.errors import OptionError
from kvthrift.score import AttentionReceived

PLANE = "power 1 0 0 1 int8"


def planes(cache: Cache, name: str) -> list[Tensor]:
    return [layer.store.plane(name) for layer in cache.state.layers if layer.store is not None]


def test_only_who_asks_for_it_gets_it() -> None:
    rounded, exact = method("h2o", products="int8"), method("h2o")
    assert exact.needs.columns
    assert not exact.needs.powers
    assert [sums.products for sums in rounded.needs.powers] == ["int8"]
    assert not rounded.needs.columns
    assert Recipe.from_plain(rounded.plain()) == rounded
    with pytest.raises(OptionError, match="int4"):
        method("h2o", products="int4")


@pytest.mark.parametrize("average", ["sum", "rows"])
def test_sums_of_rounded_products_are_read_as_exact_ones_are(average: str) -> None:
    view = with_signals(layer_view(heads=2, group=3, entries=30), needs=method("h2o", products="int8").needs)
    (wanted,) = view.powers
    view.columns = view.powers[wanted] / 3
    scores = [AttentionReceived(average, products).score(view) for products in ("exact", "int8")]  # type: ignore[arg-type]
    assert torch.equal(*scores)
    view.powers = {}
    with pytest.raises(ValueError, match="column sums"):
        AttentionReceived(products="int8").score(view)


@pytest.mark.parametrize("chunk", [None, 70])
def test_a_prompt_is_summed_nearly_as_by_exact_products(chunk: int | None) -> None:
    model, ids = tiny("llama"), text(2, 180)
    mask = torch.ones(2, 180, dtype=torch.long)
    mask[1, :37] = 0
    both = [method("h2o", budget=180, products=products) for products in ("exact", "int8")]
    cache = prefill(model, ids, "full", observe=both, attention_mask=mask, chunk=chunk)
    for exact, rounded in zip(planes(cache, "columns"), planes(cache, PLANE), strict=True):
        off = (rounded / 2 - exact).abs().sum() / exact.abs().sum()  # summed over the group of two
        assert 1e-6 < float(off) < 5e-3
    kept = [held(cache.compressed(recipe, budget=60)) for recipe in both]
    differ = sum(len(set(a) ^ set(b)) for x, y in zip(*kept, strict=True) for a, b in zip(x, y, strict=True))
    assert differ <= 0.04 * sum(len(a) for x in kept[0] for a in x)


def test_a_row_alone_is_summed_as_in_a_padded_batch() -> None:
    model, ids, recipe = tiny("llama"), text(2, 150), method("h2o", budget=150, products="int8", recent=0)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :50] = 0
    batch = prefill(model, ids, recipe, attention_mask=mask)
    alone = read(model, ids[1:, 50:], recipe)
    for together, single in zip(planes(batch, PLANE), planes(alone, PLANE), strict=True):
        torch.testing.assert_close(together[1:, :, :100], single, atol=2e-2, rtol=2e-2)  # a level may fall either way
        assert float((together[1:, :, :100] - single).abs().mean()) < 1e-3


def test_decoded_tokens_are_added_exactly() -> None:
    model, ids = tiny("llama"), text(1, 90)
    exact, rounded = (Cache(model.config, "h2o", budget=90, every=40, products=x) for x in ("exact", "int8"))
    grown = []
    for cache, name, heads in ((exact, "columns", 1), (rounded, PLANE, 2)):
        with torch.inference_mode():
            model(input_ids=ids[:, :80], past_key_values=cache, use_cache=True)
            before = [plane[..., :80].clone() / heads for plane in planes(cache, name)]
            for step in range(80, 90):
                model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        after = [plane[..., :80] / heads for plane in planes(cache, name)]
        grown.append([b - a for a, b in zip(before, after, strict=True)])
    for one, other in zip(*grown, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
