"""Caches of 4 bits by token: what packed cells say, beside vLLM's own kernels where its sources are at hand."""

from __future__ import annotations

import logging
import os
import sys
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.rotated import TOKENS, attended, form, hadamard, layer, off, written
from torch import Tensor

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.cells import ROTATED, cell_bytes

DIM = 64
SOURCE = os.environ.get("KVTHRIFT_VLLM_SOURCE", "")


def signs(dim: int) -> Tensor:
    return torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(7)).float() * 2 - 1


def test_each_number_is_read_where_it_lies_and_exactly() -> None:
    """Every code at every place, every code that stands for 0; scales less their last four bits."""
    codes = torch.randint(0, 16, (400, DIM))
    codes[:DIM] = 15 * torch.eye(DIM, dtype=torch.long)  # one number at a time
    zero = torch.arange(400)[:, None] % 16
    scale = (torch.rand(400, 1) * 3).view(torch.int32) & ~15
    pairs = torch.tensor([[a + 16 * b for a, b in zip(row[::2], row[1::2], strict=True)] for row in codes.tolist()])
    behind = (scale + zero).int().view(torch.uint8)
    cells = torch.cat((pairs.to(torch.uint8), behind), 1)
    want = (codes - zero).float() * scale.view(torch.float32)
    keys, values = form(torch.eye(DIM)).read(cells, cells.flip(0))
    assert torch.equal(keys, want)
    assert torch.equal(values, want.flip(0))


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_what_was_written_is_read_back_and_only_by_its_own_rotation(dim: int) -> None:
    x = torch.randn(50, dim) * torch.rand(50, 1) * 20 + torch.randn(dim) * 3
    flips, plain = signs(dim), hadamard(dim) / dim
    cells = written(x, flips)
    assert cells.shape[1] == cell_bytes(ROTATED, dim, torch.bfloat16) == dim // 2 + 4
    right = form(plain * flips)
    assert right.numbers(cells.shape[1]) == dim
    for found in right.read(cells, cells):
        assert off(found, x) < 0.15
    wrong = (plain, plain * -flips, plain * flips.roll(1), plain.flip(0) * flips, torch.eye(dim))
    assert min(off(form(back).read(cells, cells)[0], x) for back in wrong) > 0.9
    swapped = torch.cat((cells[:, :-4] >> 4 | cells[:, :-4] << 4, cells[:, -4:]), 1)
    assert off(right.read(swapped, swapped)[0], x) > 0.9


def test_a_token_of_equal_numbers_and_one_of_zeros() -> None:
    x = torch.stack((torch.zeros(DIM), torch.full((DIM,), 2.5)))
    found, _ = form(hadamard(DIM) * signs(DIM) / DIM).read(*(written(x, signs(DIM)),) * 2)
    assert torch.equal(found[0], x[0])
    assert off(found[1], x[1]) < 0.15


class _Platform:
    """vLLM's, where there is nothing."""

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        return lambda *_: False


class _Mode(IntEnum):
    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's kernels and our rotation, of its sources alone: the packages around them are empty."""
    import triton

    ops = "vllm.v1.attention.ops"
    said: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"largest_power_of_2_divisor": lambda n: n & -n},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": _Mode},
        ops: {"__path__": [str(Path(SOURCE, *ops.split(".")))]},
    }
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in said.items():
        module = ModuleType(name)
        vars(module).update({"__path__": [], **attributes})
        monkeypatch.setitem(sys.modules, name, module)
    ours = "kvthrift.integrations.vllm.gpu_rotation"
    theirs = {part: f"{ops}.{part}" for part in ("int4_per_token_head", "triton_unified_attention")}
    for name in (ours, *theirs.values(), f"{ops}.triton_attention_helpers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that it is taken away again
        del sys.modules[name]
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]  # type: ignore[attr-defined]
    found = {part: import_module(name) for part, name in theirs.items()}
    return SimpleNamespace(rotation=import_module(ours), **found)


@pytest.mark.skipif(not SOURCE, reason="no sources of vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("dim", "layers"), [(64, 1), (64, 2), (128, 1)])
def test_what_vllms_kernel_writes_is_what_we_read(stock: SimpleNamespace, dim: int, layers: int) -> None:
    back = stock.rotation.rotation_back(dim, torch.device("cpu"))
    pages, blocks, numbers = layer(stock.int4_per_token_head.reshape_and_cache_int4, back, layers)
    flips = stock.int4_per_token_head.single_rht(torch.eye(dim))[:, 0]  # the first of each row is the sign alone
    for half, (found, x) in enumerate(zip(pages.read(pages.of(blocks)), numbers, strict=True)):
        for head, own in enumerate(pages.of(blocks)):
            assert off(found[head][:TOKENS], x[:, head]) < 0.15
            stored = pages._cells[own].flatten(0, 1)[:TOKENS].chunk(2, dim=1)[half]
            twin = written(x[:, head], flips)
            assert (stored != twin).float().mean() < 0.02  # a half may be rounded either way
            again = form(hadamard(dim) * flips / dim).read(stored, stored)[0]
            torch.testing.assert_close(again, found[head][:TOKENS])


@pytest.mark.skipif(not SOURCE, reason="no sources of vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vllms_kernel_reads_heads_of_unequal_lengths_as_we_do(stock: SimpleNamespace) -> None:
    back = stock.rotation.rotation_back(DIM, torch.device("cpu"))
    pages, blocks, _ = layer(stock.int4_per_token_head.reshape_and_cache_int4, back, 2)
    unified = stock.triton_unified_attention.unified_attention
    found, want = attended(unified, _Mode.INT4_PER_TOKEN_HEAD, pages, blocks)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not SOURCE, reason="no sources of vLLM")
def test_what_is_no_rotation_is_refused(stock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock.rotation, "single_rht", lambda x, inverse: x if inverse else -x)
    with pytest.raises(UnsupportedModelError, match="heads of 32 numbers"):
        stock.rotation.rotation_back(32, torch.device("cpu"))
