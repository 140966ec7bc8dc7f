"""A few tokens behind a compressed cache are read from its pages in their place, and say what the other path says.

That is how a GPU reads them; here the naive twins stand for its kernels, or Triton's interpreter runs them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.models import text, tiny
from torch import Tensor

import kvthrift
from kvthrift import kernels
from kvthrift.runtime.layer import FEW

PROMPT, PAGE = 90, 16
READING: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv": {"budget": 40},
    "adakv": {"budget": 40},
    "streamingllm": {"budget": 40},
    "h2o": {"budget": 40, "every": 60},
    "snapkv, folded": {"budget": 40, "merge": "fold"},
    "adakv, int8": {"budget": 40, "codec": "int8"},
    "snapkv, int2": {"budget": 40, "codec": "int2"},
}


def read(name: str, batch: int, mask: Tensor | None = None) -> kvthrift.Cache:
    method = name.partition(",")[0]
    model = tiny("llama")
    return kvthrift.prefill(
        model, text(batch, PROMPT), method, page=PAGE, attention_mask=None if mask is None else mask[:, :PROMPT],
        **READING[name],
    )  # fmt: skip


@torch.inference_mode()
def go_on(past: kvthrift.Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    extra = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    logits: Tensor = tiny("llama")(input_ids=ids, past_key_values=past, attention_mask=mask, **extra).logits
    return logits


Asked = list[dict[str, Any]]
HOWS = ["naive", "triton"]


def in_place(patch: pytest.MonkeyPatch, how: str) -> Asked:
    """Have stores say that kernels fit their pages; what the reading kernel is asked from now on."""
    asked: Asked = []
    attend = kernels.paged_attend

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append({"queries": q.shape[2], **kwargs})
        return attend(q, *args, **kwargs)

    if how == "triton":
        pytest.importorskip("triton")
        patch.setattr("kvthrift.kernels.paged.unfit", lambda *_: None)
    patch.setattr("kvthrift.store.read.unfit", lambda *_: None)
    patch.setattr("kvthrift.kernels.paged_attend", noted)
    return asked


def alike(mine: kvthrift.Cache, theirs: kvthrift.Cache) -> None:
    for one, other in zip(mine.state.layers, theirs.state.layers, strict=True):
        assert one.store is not None
        assert other.store is not None
        assert np.array_equal(one.store.lengths, other.store.lengths)
        assert one.since == other.since
        valid = one.store.valid()
        assert torch.equal(one.store.positions()[valid], other.store.positions()[valid])
        found, wanted = one.store.read().keys[valid], other.store.read().keys[valid]
        if one.store.pool.form is None:
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        else:  # a number between two levels may go either way
            assert ((found - wanted).abs() > 1e-3).float().mean() < 0.01
        for plane in one.store.pool.planes:
            torch.testing.assert_close(
                one.store.plane(plane)[valid], other.store.plane(plane)[valid], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("length", [2, FEW])
@pytest.mark.parametrize("name", READING)
def test_it_says_what_the_other_path_says(name: str, length: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    past, more, again = read(name, 2), text(2, length, seed=4), text(2, 3, seed=5)
    other = past.fork()
    wanted = [go_on(other, more), go_on(other, again)]
    asked = in_place(monkeypatch, how)
    found = [go_on(past, more), go_on(past, again)]
    assert [x["queries"] for x in asked] == [length] * 2 + [3] * 2  # two layers
    assert all(x.get("causal", False) == ("int" not in name) for x in asked)
    near = 2e-3 if "int8" in name else 2e-4  # a level of 255 more or less
    for one, twin in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, twin, atol=near, rtol=near)
    alike(past, other)
    del other
    past.check_integrity()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["snapkv", "adakv", "h2o"])
def test_rows_of_unequal_lengths(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle row has padding within the pass, which takes no entries and hides none."""
    mask = torch.ones(3, PROMPT + 5, dtype=torch.long)
    mask[0, :30], mask[1, PROMPT : PROMPT + 3] = 0, 0
    past, more = read(name, 3, mask), text(3, 5, seed=4)
    other = past.fork()
    wanted = go_on(other, more, mask)
    asked = in_place(monkeypatch, how)
    found = go_on(past, more, mask)
    assert asked
    real = mask[:, PROMPT:].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    alike(past, other)


def test_candidates_that_are_taken_back_never_were(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_place(monkeypatch, "naive")
    past = read("adakv", 1)
    twin, right = past.fork(), text(1, 4, seed=6)
    go_on(past, text(1, 9, seed=5))
    past.crop(-9)
    torch.testing.assert_close(go_on(past, right), go_on(twin, right), atol=2e-4, rtol=2e-4)
    assert asked


def test_more_tokens_than_one_read_takes_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_place(monkeypatch, "naive")
    go_on(read("adakv", 1), text(1, FEW + 1))
    assert asked == []


def test_token_by_token_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_place(monkeypatch, "naive")
    past, more = read("adakv", 2), text(2, 6, seed=4)
    other = past.fork()
    wanted = torch.cat([go_on(other, more[:, i : i + 1]) for i in range(6)], dim=1)
    torch.testing.assert_close(go_on(past, more), wanted, atol=2e-4, rtol=2e-4)
    assert {x["queries"] for x in asked} == {1, 6}
