"""A few tokens behind a compressed cache on a GPU: one read of its pages says what the other path says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import text, tiny
from torch import Tensor

import kvthrift
from kvthrift import kernels
from kvthrift.runtime.layer import FEW, LayerCache

pytestmark = pytest.mark.gpu

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv": {"budget": 40},
    "adakv": {"budget": 40},
    "h2o": {"budget": 40, "every": 60},
    "snapkv, folded": {"budget": 40, "merge": "fold"},
    "adakv, int8": {"budget": 40, "codec": "int8"},
    "snapkv, int2": {"budget": 40, "codec": "int2"},
}


@pytest.fixture(autouse=True)
def _model_goes_back() -> Any:
    yield
    tiny("llama").to("cpu", torch.float32)


def model(dtype: torch.dtype) -> Any:
    return tiny("llama").to("cuda", dtype)


def read(name: str, network: Any, batch: int) -> kvthrift.Cache:
    method = name.partition(",")[0]
    return kvthrift.prefill(network, text(batch, 150).cuda(), method, page=16, **METHODS[name])


@torch.inference_mode()
def go_on(network: Any, past: kvthrift.Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    logits: Tensor = network(input_ids=ids.cuda(), past_key_values=past, attention_mask=mask).logits
    return logits.float()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [2, 5, FEW])
@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_the_other_path_says(name: str, length: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, near = (torch.bfloat16, 0.15) if "int" in name else (torch.float32, 5e-4)
    network, more = model(dtype), text(batch, length, seed=4)
    past, asked, attend = read(name, network, batch), list[int](), kernels.paged_attend
    other = past.fork()

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(q.shape[2])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr("kvthrift.kernels.paged_attend", noted)
    found = go_on(network, past, more)
    assert asked == [length] * 2  # two layers
    monkeypatch.setattr(LayerCache, "_read_few", LayerCache._read_all)
    wanted = go_on(network, other, more)
    assert asked == [length] * 2
    torch.testing.assert_close(found, wanted, atol=near, rtol=near)
    for mine, theirs in zip(past.state.layers, other.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        assert (mine.store.lengths == theirs.store.lengths).all()
        counted = torch.from_numpy(mine.store.lengths).flatten()
        assert torch.equal(mine.store.paged().lengths.long().cpu(), counted)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_rows_with_padding_within_the_pass(name: str) -> None:
    network, more = model(torch.float32), text(2, 6, seed=4)
    past = read(name, network, 2)
    alone = past.fork()
    mask = torch.ones(2, 156, dtype=torch.long, device="cuda")
    mask[1, 150:153] = 0
    found = go_on(network, past, more, mask)
    alone.batch_select_indices(torch.tensor([0]))
    torch.testing.assert_close(found[:1], go_on(network, alone, more[:1]), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}, {"assistant": True}])
def test_guesses_change_no_token(method: str, how: dict[str, Any]) -> None:
    network, ids = model(torch.float32), text(1, 12).repeat(1, 12).cuda()
    budget = None if method == "full" else 50
    how = {"assistant_model": tiny("llama", "sdpa", seed=3).to("cuda")} if "assistant" in how else how
    caches = [kvthrift.Cache(network.config, method, budget=budget) for _ in range(2)]
    found = kvthrift.generate(network, ids, caches[0], max_new_tokens=40, **how)
    assert torch.equal(found, kvthrift.generate(network, ids, caches[1], max_new_tokens=40))
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    tiny("llama", "sdpa", seed=3).to("cpu")
