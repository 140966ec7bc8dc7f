"""A cache used wrongly says so, and is either as it was before or refuses to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.models import build, config, text, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import kvthrift
from kvthrift.errors import BudgetError, CacheStateError, ModelMismatchError, RecipeError, UnsupportedModelError

PROMPT = 60


@torch.inference_mode()
def read(model: PreTrainedModel, past: kvthrift.Cache, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, past_key_values=past, use_cache=True).logits
    return logits


def compressed(model: PreTrainedModel) -> kvthrift.Cache:
    return kvthrift.Cache(model.config, "snapkv", budget=24, window=8, page=8)


@contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    def fail(*args: object) -> None:
        raise RuntimeError("out of something")

    hook = module.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of something"):
            yield
    finally:
        hook.remove()


# -- another model -------------------------------------------------------------------------------------------------


def test_a_model_with_another_config_is_refused() -> None:
    past = compressed(tiny("llama"))
    for name in ("qwen2", "gpt_neox"):
        with pytest.raises(ModelMismatchError, match="another config"):
            read(tiny(name), past, text(1, PROMPT))
    assert read(tiny("llama"), past, text(1, PROMPT)).isfinite().all()


def test_a_model_with_other_weights_is_refused_and_the_right_one_reads_on() -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    ids, more = text(1, PROMPT), text(1, 3)
    past, twin = compressed(model), compressed(model)
    read(model, past, ids)
    read(model, twin, ids)
    with pytest.raises(ModelMismatchError, match="filled by another model"):
        read(other, past, more)
    assert torch.equal(read(model, past, more), read(model, twin, more))


def test_another_batch_is_refused_and_the_right_one_reads_on() -> None:
    model, ids = tiny("llama"), text(2, PROMPT)
    past, twin = compressed(model), compressed(model)
    read(model, past, ids)
    read(model, twin, ids)
    for batch in (1, 3):
        with pytest.raises(ModelMismatchError, match=f"holds 2 sequences .* brings {batch} of"):
            read(model, past, text(batch, 4))
    assert torch.equal(read(model, past, text(2, 4)), read(model, twin, text(2, 4)))


def test_another_dtype_is_refused() -> None:
    model = build(config("llama"))
    past = compressed(model)
    read(model, past, text(1, PROMPT))
    with pytest.raises(ModelMismatchError, match="bfloat16"):
        read(model.to(torch.bfloat16), past, text(1, 4))


# -- a budget that turns out too small -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["10%", "8KiB"])
def test_a_budget_below_what_is_protected_is_refused_before_anything_changes(budget: str) -> None:
    model, ids = tiny("llama"), text(1, PROMPT)
    past = kvthrift.Cache(model.config, "snapkv", budget=budget, window=32, page=8)
    for _ in range(2):  # the second time it is refused for the same reason, not for a pass that failed half way
        with pytest.raises(BudgetError):
            read(model, past, ids)
    assert past.get_seq_length() == 0
    assert past.fork().state.held == 0


# -- a forward pass that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("llama", 0), ("llama", 1), ("gemma3", 0), ("gemma3", 1), ("gemma3", 2)])
@pytest.mark.parametrize("before", [0, PROMPT])
def test_after_a_pass_that_failed_half_way_only_reset_helps(name: str, layer: int, before: int) -> None:
    model, ids, more = tiny(name), text(1, PROMPT), text(1, 5)
    past = compressed(model)
    if before:
        read(model, past, ids)
    if name == "llama" and layer == 1:  # behind the last attention: fail in front of it instead
        module: nn.Module = model.model.layers[1].input_layernorm  # type: ignore[union-attr,index]
    else:
        module = model.model.layers[layer]  # type: ignore[union-attr,index]
    with failing(module):
        read(model, past, more)
    for attempt in (more, text(1, 1)):
        with pytest.raises(CacheStateError, match=r"reset\(\)"):
            read(model, past, attempt)
    past.reset()
    assert past.get_seq_length() == 0
    assert torch.equal(read(model, past, ids), read(model, compressed(model), ids))
    past.check_integrity()


def test_a_broken_cache_is_not_forked_but_an_earlier_fork_goes_on() -> None:
    model, ids, more = tiny("llama"), text(1, PROMPT), text(1, 5)
    past, twin = compressed(model), compressed(model)
    read(model, past, ids)
    read(model, twin, ids)
    fork = past.fork()
    with failing(model.model.layers[0]):  # type: ignore[union-attr,index]
        read(model, past, more)
    with pytest.raises(CacheStateError, match="fork"):
        past.fork()
    assert torch.equal(read(model, fork, more), read(model, twin, more))


def test_a_failure_behind_the_last_layer_loses_nothing() -> None:
    """The tokens are read; only their logits are lost."""
    model, ids = tiny("llama"), text(1, PROMPT)
    past, twin = compressed(model), compressed(model)
    read(model, twin, ids)
    with failing(model.lm_head):  # type: ignore[arg-type]
        read(model, past, ids)
    assert torch.equal(read(model, past, text(1, 2)), read(model, twin, text(1, 2)))


def test_dropout_is_refused_and_eval_reads_on() -> None:
    model = build(config("llama", attention_dropout=0.5))
    past = compressed(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        read(model, past, text(1, PROMPT))
    model.eval()
    assert read(model, past, text(1, PROMPT)).isfinite().all()


# -- budgets and recipes -------------------------------------------------------------------------------------------


def test_a_budget_below_what_is_protected_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"31 entries .* 32 recent"):
        kvthrift.Cache(tiny("llama").config, "snapkv", budget=31)


@pytest.mark.parametrize("budget", ["10%", "64KiB"])
def test_a_budget_that_is_known_only_later_is_refused_then(budget: str) -> None:
    model = tiny("llama")
    past = kvthrift.Cache(model.config, "random", budget=budget, page=16, sinks=130)
    with pytest.raises(BudgetError, match="always keeps"):
        read(model, past, text(2, 300))


def test_a_budget_below_one_page_a_head_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(BudgetError, match="one page of 64 entries"):
        read(model, kvthrift.Cache(model.config, "knorm", budget="64KiB"), text(2, 300))


def test_bytes_in_all_are_what_is_held() -> None:
    model = tiny("llama")
    for budget in ("64KiB", "100KiB"):
        past = kvthrift.Cache(model.config, "knorm", budget=budget, page=16)
        read(model, past, text(2, 400))
        row_of_pages = 2 * 2 * 2 * 16 * (2 * 16 * 4 + 4)  # layers, sequences, heads, entries, bytes of one
        assert past.report().bytes <= kvthrift.Budget.parse(budget).amount < past.report().bytes + row_of_pages


def test_a_share_is_a_share_of_what_was_read() -> None:
    model = tiny("llama")
    past = kvthrift.Cache(model.config, "knorm", budget="25%")
    read(model, past, text(2, 200))
    assert past.report().entries == past.report().full_entries // 4


@pytest.mark.parametrize(
    ("recipe", "options", "why"),
    [
        ("snapkv", {"skip": (5,)}, "skip"),
        (kvthrift.method("snapkv"), {"window": 8}, "options window"),
        (3, {}, "not int"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(recipe: object, options: dict[str, object], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        kvthrift.Cache(tiny("llama").config, recipe, budget=48, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("skip", [(0,), (-1,), (0, 1)])
def test_skipped_layers_keep_everything(skip: tuple[int, ...]) -> None:
    model = tiny("llama")
    past = kvthrift.Cache(model.config, "snapkv", budget=24, window=8, skip=skip)
    read(model, past, text(1, PROMPT))
    for row in past.report().layers:
        whole = row.layer in skip or row.layer - 2 in skip
        assert row.most == (PROMPT if whole else 24)
        assert ("skips" in row.note) == whole
