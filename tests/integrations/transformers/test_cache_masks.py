"""Masks that are padding are honoured; every other one is refused, and the refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import text, tiny
from torch import Tensor
from transformers import StaticCache

import kvthrift
from kvthrift.errors import MaskError

BATCH, PROMPT = 2, 50


def mask(columns: int, hidden: int = 7) -> Tensor:
    """The first sequence begins with some padding."""
    made = torch.ones(BATCH, columns, dtype=torch.long)
    made[0, :hidden] = 0
    return made


@torch.inference_mode()
def read(past: kvthrift.Cache, ids: Tensor, attention_mask: Tensor | None = None, **extra: Any) -> Tensor:
    logits: Tensor = tiny("llama")(input_ids=ids, attention_mask=attention_mask, past_key_values=past, **extra).logits
    return logits


def compressed() -> kvthrift.Cache:
    return kvthrift.Cache(tiny("llama").config, "snapkv", budget=24, window=8)


def filled() -> kvthrift.Cache:
    past = compressed()
    read(past, text(BATCH, PROMPT), mask(PROMPT))
    return past


def causal(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows).expand(BATCH, 1, rows, columns)


WRONG = {
    "changed": (mask(PROMPT + 3, hidden=6), "says otherwise"),
    "none": (None, "without an attention mask"),
    "for old columns": (mask(PROMPT), "sequences of 53 tokens"),
    "for new columns": (mask(3), "sequences of 53 tokens"),
    "four dimensions": (causal(3, PROMPT + 3), "another pattern"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_is_refused_and_the_right_one_reads_on(name: str) -> None:
    past, twin = filled(), filled()
    wrong, why = WRONG[name]
    with pytest.raises(MaskError, match=why):
        read(past, text(BATCH, 3), wrong)
    right = mask(PROMPT + 3)
    assert torch.equal(read(past, text(BATCH, 3), right), read(twin, text(BATCH, 3), right))


def test_a_full_mask_is_refused_on_the_first_pass_too() -> None:
    past = compressed()
    with pytest.raises(MaskError, match="another pattern"):
        read(past, text(BATCH, PROMPT), causal(PROMPT, PROMPT))
    assert torch.equal(read(past, text(BATCH, PROMPT)), read(compressed(), text(BATCH, PROMPT)))


def test_a_mask_of_ones_is_no_mask() -> None:
    ids, more = text(BATCH, PROMPT), text(BATCH, 3)
    past, twin = compressed(), compressed()
    for left in (ids, more):
        total = past.get_seq_length() + left.shape[1]
        ones = torch.ones(BATCH, total, dtype=torch.long)
        assert torch.equal(read(past, left, ones), read(twin, left))
    assert not past.state.columns.padded


def test_a_padded_cache_may_be_read_on_without_new_padding() -> None:
    past = filled()
    assert past.state.columns.padded
    out = read(past, text(BATCH, 1), mask(PROMPT + 1))
    assert out.isfinite().all()
    assert past.report().tokens == (PROMPT - 6, PROMPT + 1)


@pytest.mark.parametrize("holes", ["middle", "alternating"])
def test_padding_may_stand_anywhere(holes: str) -> None:
    """Masked columns in the middle are as good as not there."""
    ids = text(1, PROMPT)
    keep = torch.ones(1, PROMPT, dtype=torch.long)
    keep[0, slice(10, 30) if holes == "middle" else slice(5, 40, 2)] = 0
    short = ids[keep.bool()][None]
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    past, twin = compressed(), compressed()
    left = read(past, ids, keep, position_ids=positions)[keep.bool()]
    torch.testing.assert_close(left, read(twin, short)[0], atol=2e-4, rtol=1e-4)
    assert past.report().entries == twin.report().entries


def test_a_static_cache_works_through_our_attention() -> None:
    """Its keys are followed by room that is not filled yet."""
    ids = text(BATCH, 20)
    out = []
    for attention in ("kvthrift", "sdpa"):
        model = tiny("llama", attention)
        past = StaticCache(config=model.config, max_cache_len=64)
        with torch.inference_mode():
            first = model(input_ids=ids, past_key_values=past).logits
            second = model(input_ids=text(BATCH, 1), past_key_values=past).logits
        out.append(torch.cat((first, second), dim=1))
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=1e-5)


def test_packed_sequences_are_told_apart_without_our_cache() -> None:
    """Two texts in one row, by their positions: ours reads them as transformers does."""
    ids = text(1, 24)
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    with torch.inference_mode():
        both = [
            tiny("llama", attention)(input_ids=ids, position_ids=positions, use_cache=False).logits
            for attention in ("kvthrift", "sdpa")
        ]
        apart = tiny("llama")(input_ids=ids[:, 10:], use_cache=False).logits
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[0][:, 10:], apart, atol=1e-4, rtol=1e-4)
