"""What a method cannot do with a budget, a text or a rule that makes no sense: a sentence, or the plain answer."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import DELIMITERS, fitted
from tests.knowing import Letters
from tests.models import text, tiny
from tests.reading import DECIDES, deep, held

from kvthrift import BudgetError, Cache, MissingSignalError, Recipe, method, methods, prefill

N = 120
GUARDED = [name for name in methods() if method(name).protect.entries > 1]


def recipe(name: str, budget: int | str) -> Recipe:
    return fitted(method(name, budget=budget, **({"skip": ()} if name in DECIDES else {})))


@pytest.mark.parametrize("name", GUARDED)
def test_a_budget_below_what_is_protected_is_refused_with_both_numbers(name: str) -> None:
    protect = method(name).protect
    said = rf"gives {protect.entries - 1} entries a head, but {name} always keeps {protect.sinks} sinks and "
    said += rf"{protect.recent} recent entries. Raise the budget or protect less"
    with pytest.raises(BudgetError, match=said):
        Cache(tiny("llama").config, recipe(name, protect.entries - 1))
    Cache(tiny("llama").config, recipe(name, protect.entries))


@pytest.mark.parametrize("name", GUARDED)
def test_so_is_a_share_of_a_short_prompt_before_anything_is_read(name: str) -> None:
    cache = None
    with pytest.raises(BudgetError, match=rf"budget 1% gives 1 entries a head, but {name} always keeps"):
        cache = prefill(tiny("llama"), text(1, N), recipe(name, "1%"), delimiters=DELIMITERS)
    assert cache is None


# -- texts without a delimiter -------------------------------------------------------------------------------------


def test_a_text_without_any_delimiter_keeps_the_best_single_entries() -> None:
    model, ids = tiny("llama"), text(1, N)
    plain = method("snapkv", window=8, budget=40).with_options(scorer=method("sablock").scorer)
    wanted = held(prefill(model, ids, plain, delimiters=()))
    assert held(prefill(model, ids, "sablock", budget=40, delimiters=())) == wanted
    assert held(prefill(model, ids, "sablock", budget=40, delimiters=DELIMITERS)) != wanted


def test_a_text_that_is_all_delimiters_is_cut_into_single_entries() -> None:
    model, ids = tiny("llama"), text(2, N)
    cache = prefill(model, ids, "sablock", budget=40, delimiters=range(199))
    assert cache.report().entries == 40 * 8
    cache.check_integrity()


def test_a_text_whose_tokens_nobody_told_is_refused() -> None:
    with pytest.raises(MissingSignalError, match="cuts the text at its punctuation, but a forward pass"):
        prefill(tiny("llama"), text(1, N), "sablock", budget=40)


# -- rules that stop at once or never ------------------------------------------------------------------------------


def test_a_stop_rule_that_fires_at_once_drops_nothing_and_says_so() -> None:
    """Every entry is looked at, if little: none may go without loss."""
    model, ids = deep(4), text(2, N)
    cache = prefill(model, ids, "dbudgetkv", loss=0.0)
    report = cache.report()
    assert report.kept == 1.0
    assert report.entries == report.full_entries
    assert "as much as is needed" in report.recipe
    assert f"entries {report.full_entries:,} of {report.full_entries:,}" in str(report)
    with torch.inference_mode():
        ours, whole = (model(input_ids=ids[:, :1], past_key_values=c).logits for c in (cache, prefill(model, ids)))
    assert torch.equal(ours, whole)


def test_a_stop_rule_that_never_fires_leaves_sinks_and_the_newest_and_says_so() -> None:
    report = prefill(deep(4), text(2, N), "dbudgetkv", loss=1.0).report()
    assert [(row.fewest, row.most) for row in report.layers] == [(N, N)] * 2 + [(5, 5)] * 2
    assert "5 / 5.0 / 5" in str(report)
    assert report.kept == pytest.approx((2 * N + 2 * 5) / 4 / N)


@pytest.mark.parametrize(("threshold", "kept"), [(-30.0, N), (30.0, 32)])
def test_a_threshold_that_all_or_none_reach(threshold: float, kept: int) -> None:
    rule = fitted(method("kvzap", budgets="threshold", threshold=threshold))
    report = prefill(tiny("llama"), text(2, N), rule).report()
    assert [(row.fewest, row.most) for row in report.layers] == [(kept, kept)] * 2
    assert f"{kept} / {kept}.0 / {kept}" in str(report)
    assert "as much as is needed" in report.recipe


@pytest.mark.parametrize("loss", [-0.1, float("nan")])
def test_a_stop_rule_that_means_nothing_is_refused(loss: float) -> None:
    with pytest.raises(Exception, match=f"loss={loss} must be 0 or more"):
        method("dbudgetkv", loss=loss)


def test_a_tokenizer_finds_no_delimiter_in_letters() -> None:
    """Where a tokenizer's text has none, that is one segment too."""
    ids = torch.tensor([Letters()("a text of words alone and no more of it " * 3)["input_ids"]])
    marks = {Letters()(mark, add_special_tokens=False)["input_ids"][0] for mark in ",.;:!?\n"}
    assert not marks & set(ids[0].tolist())
    cache = prefill(tiny("llama"), ids, "sablock", budget=40, delimiters=marks)
    assert held(cache) == held(prefill(tiny("llama"), ids, "sablock", budget=40, delimiters=()))
