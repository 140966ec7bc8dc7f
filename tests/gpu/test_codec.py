"""Pages in few bits on a GPU: packed instructions against the naive twin, and recorded steps against eager ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.test_coded import FORMS, coded_pages, sound
from tests.models import VOCABULARY, tiny
from torch import Tensor

import kvthrift
from kvthrift.integrations.transformers.graph import GraphSteps, obstacle
from kvthrift.kernels import Paged, naive, paged_append, paged_attend

pytestmark = pytest.mark.gpu

LENGTHS = ([1, 63, 64, 65, 1000, 0, 129, 300], [512] * 8)


def copied(paged: Paged) -> Paged:
    assert paged.coded is not None
    coded = replace(paged.coded, **{k: v.clone() for k, v in vars(paged.coded).items() if isinstance(v, Tensor)})
    own = {k: v.clone() for k, v in vars(paged).items() if isinstance(v, Tensor)}
    return replace(paged, **own, coded=coded)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["ragged", "even"])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_reading_is_what_the_naive_twin_reads(
    name: str, dtype: torch.dtype, dims: tuple[int, int], group: int, lengths: list[int]
) -> None:
    paged, _ = coded_pages(FORMS[name], lengths, dim=dims[0], value_dim=dims[1], page=64, dtype=dtype, bias=group == 7)
    q = torch.randn(2, 4 * group, 1, dims[0], device="cuda").to(dtype)
    found = paged_attend(q, paged, scale=dims[0] ** -0.5)
    wanted = naive.paged_attend(q.float(), sound(paged), scale=dims[0] ** -0.5)
    assert found.out.dtype == dtype
    assert float((found.out - wanted.out).norm() / wanted.out.norm()) < (1e-2 if dtype == torch.bfloat16 else 5e-3)
    torch.testing.assert_close(found.lse, wanted.lse, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_many_queries_read_what_few_do(name: str, dtype: torch.dtype, dim: int, group: int) -> None:
    """Those of four warps were wrong, or out of bounds."""
    paged, _ = coded_pages(FORMS[name], LENGTHS[0], dim=dim, value_dim=dim, page=64, dtype=dtype)
    q = torch.randn(2, 4 * group, 1, dim, device="cuda").to(dtype)
    found = paged_attend(q, paged, scale=dim**-0.5)
    wanted = naive.paged_attend(q.float(), sound(paged), scale=dim**-0.5)
    assert float((found.out - wanted.out).norm() / wanted.out.norm()) < (1e-2 if dtype == torch.bfloat16 else 5e-3)
    torch.testing.assert_close(found.lse, wanted.lse, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64), (128, 128), (96, 144), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_appending_is_what_the_naive_twin_appends(name: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    paged, _ = coded_pages(FORMS[name], LENGTHS[0], dim=dims[0], value_dim=dims[1], page=64, dtype=dtype, room=1)
    paged, twin = sound(paged), copied(sound(paged))
    k, v = (torch.randn(2, 4, 1, dim, device="cuda").to(dtype) for dim in dims)
    positions = torch.tensor([5, 9], device="cuda")
    paged_append(k, v, positions, paged)
    naive.paged_append(k, v, positions, twin)
    for field in ("keys", "values", "positions", "lengths"):
        assert torch.equal(getattr(paged, field), getattr(twin, field))
    for field, wanted in vars(twin.coded).items():
        if isinstance(wanted, Tensor):
            assert (getattr(paged.coded, field) != wanted).float().mean() < 1e-3


@pytest.fixture
def model() -> Any:
    yield tiny("llama").to("cuda", torch.bfloat16)
    tiny("llama").to("cpu", torch.float32)


@torch.inference_mode()
def eager(model: Any, cache: kvthrift.Cache, tokens: Tensor) -> Tensor:
    steps = [model(input_ids=t[:, None], past_key_values=cache).logits[:, -1].clone() for t in tokens.T]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize(("method", "budget"), [("full", None), ("snapkv", 48), ("adakv", 50), ("lava", 50)])
@pytest.mark.parametrize("codec", sorted(FORMS))
def test_replays_say_what_eager_steps_say(model: Any, codec: str, method: str, budget: int | None) -> None:
    """Pages fill up, and are written, within the recording; one that is full already when it is made is not lost."""
    ids = torch.randint(1, VOCABULARY, (2, 144), device="cuda")
    cache = kvthrift.prefill(model, ids, method, budget=budget, page=16, codec=codec)
    other = cache.fork()
    tokens = torch.randint(1, VOCABULARY, (2, 40), device="cuda")
    wanted = eager(model, other, tokens)
    assert obstacle(model, cache) is None
    steps = GraphSteps(model, cache, 40)
    found = torch.stack([steps.step(t).clone() for t in tokens.T], dim=1)
    steps.finish()
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 2e-2
    for mine, theirs in zip(cache.state.layers, other.state.layers, strict=True):
        assert mine.store is not None
        assert theirs.store is not None
        valid = mine.store.valid()
        assert torch.equal(mine.store.positions()[valid], theirs.store.positions()[valid])
    del other
    cache.check_integrity()
    assert eager(model, cache, tokens[:, :2]).isfinite().all()
