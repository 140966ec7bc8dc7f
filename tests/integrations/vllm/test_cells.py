"""Caches of fewer bits: what cells say, and that they are moved bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.cells import PLAIN, ROTATED, cell_bytes, cells_of, pick, shown, unserved
from kvthrift.integrations.vllm.gpu_pages import Pages
from kvthrift.integrations.vllm.settings import KEY, read_settings

BLOCKS, HEADS, SIZE, DIM = 6, 3, 4, 8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def written(x: Tensor, kind: torch.dtype, scale: float) -> Tensor:
    """Bytes as vLLM's kernels store them."""
    return (x / scale).to(kind).view(torch.uint8)


@pytest.mark.parametrize(("name", "kind"), [("fp8", E4M3), ("fp8_e4m3", E4M3), ("fp8_e5m2", E5M2)])
def test_a_layers_scales_are_what_its_bytes_are_multiplied_by(name: str, kind: torch.dtype) -> None:
    keys, values = torch.randn(2, 50, DIM)
    cells = cells_of(name, torch.tensor(0.25), torch.tensor(3.0), torch.float32)
    said = cells.read(written(keys, kind, 0.25), written(values, kind, 3.0))
    for found, x, scale in zip(said, (keys, values), (0.25, 3.0), strict=True):
        assert torch.equal(found, (x / scale).to(kind).float() * scale)
        assert (found - x).abs().max() < 0.15 * x.abs().max()


def test_a_scale_that_is_set_late_counts() -> None:
    scale = torch.tensor(1.0)
    cells = cells_of("fp8", scale, scale, torch.float32)
    scale.fill_(2.0)
    assert cells.read(*(written(torch.full((1, 1), 4.0), E4M3, 2.0),) * 2)[0].item() == 4.0


@pytest.mark.parametrize(
    ("name", "kind", "top"), [("int8_per_token_head", torch.int8, 127.0), ("fp8_per_token_head", E4M3, 448.0)]
)
def test_a_tokens_own_scale_lies_behind_its_numbers(name: str, kind: torch.dtype, top: float) -> None:
    x = torch.randn(50, DIM) * torch.rand(50, 1) * 100
    scale = x.abs().amax(1, keepdim=True) / top
    numbers = (x / scale).round().to(kind) if kind == torch.int8 else (x / scale).to(kind)
    stored = torch.cat((numbers.view(torch.uint8), scale.view(torch.uint8)), 1)
    if kind == torch.int8:
        stored = stored.view(torch.int8)
    cells = cells_of(name, None, None, torch.float32)
    both = torch.cat((stored, stored), 1)
    for found in cells.read(*both.chunk(2, dim=1)):
        assert found.shape == x.shape
        torch.testing.assert_close(found, x, rtol=0.07, atol=0.005 * float(x.abs().max()))
    assert cells.numbers(stored.shape[1]) == DIM
    assert cell_bytes(name, DIM, torch.bfloat16) == stored.shape[1]


def test_numbers_as_they_are_stay_as_they_are() -> None:
    x = torch.randn(5, DIM)
    assert PLAIN.read(x, -x)[0] is x
    assert cells_of("auto", None, None, torch.bfloat16).kind is None
    assert cell_bytes("auto", DIM, torch.float32) == 4 * DIM
    assert cell_bytes("bfloat16", DIM, torch.float32) == 2 * DIM
    assert cell_bytes("fp8", DIM, torch.float32) == DIM


def test_scales_of_single_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="scale for each head"):
        cells_of("fp8", torch.ones(HEADS), torch.ones(HEADS), torch.bfloat16)


def test_queries_in_fp8_are_read_with_their_scale() -> None:
    q = torch.randn(7, HEADS, DIM)
    byte = (q / 0.5).to(E4M3)
    found = shown(pick(byte, torch.tensor([6, 0])), torch.tensor(0.5), torch.bfloat16)
    assert torch.equal(found, (byte[[6, 0]].float() * 0.5).bfloat16())
    assert shown(q, None, torch.bfloat16) is q
    assert torch.equal(pick(q, torch.tensor([3])), q[3:4])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["fp8", "int8_per_token_head", ROTATED])
def test_cells_are_moved_bit_by_bit(name: str, layers: int) -> None:
    """Bytes of every kind, of which some are no numbers at all."""
    width = cell_bytes(name, DIM, torch.bfloat16)
    kind = torch.int8 if "int8" in name else torch.uint8
    cache = torch.randint(0, 256, (BLOCKS, layers, HEADS, SIZE, 2 * width), dtype=torch.uint8).view(kind)[:, -1]
    back = torch.eye(DIM) if name == ROTATED else None
    pages, was = Pages(cache, cells_of(name, 0.1, 0.2, torch.bfloat16, back)), cache.clone()
    assert (pages.dim, pages.keys.shape[-1]) == (DIM, width)
    blocks = torch.tensor([4, 0, 2])
    source, there = pages.of(blocks), pages.shared_out(blocks[1:], [3, 1, 2])
    kept = [torch.randperm(3 * SIZE)[: len(own) * SIZE].sort().values for own in there]
    pages.move(source, kept, there)
    flat = was[blocks].transpose(0, 1).flatten(1, 2)  # [H, n, 2C]
    want = torch.cat([flat[head, places] for head, places in enumerate(kept)])
    assert torch.equal(cache[blocks[1:]].flatten(0, 2), want)
    others = [block for block in range(BLOCKS) if block not in blocks.tolist()[1:]]
    assert torch.equal(cache[others], was[others])
    assert pages.no_queries(5).shape == (0, 5, DIM)
    assert pages.no_queries(5).dtype == torch.bfloat16


@pytest.mark.parametrize("layers", [1, 2])
def test_scales_behind_numbers_are_seen_page_by_page(layers: int) -> None:
    width = DIM + 4
    cache = torch.zeros(BLOCKS, layers, HEADS, SIZE, 2 * width, dtype=torch.int8)
    scales = torch.rand(BLOCKS, layers, HEADS, SIZE, 2)
    for half in (0, 1):
        place = half * width + DIM
        cache[..., place : place + 4] = scales[..., half : half + 1].contiguous().view(torch.int8)
    pages = Pages(cache[:, -1], cells_of("int8_per_token_head", None, None, torch.bfloat16))
    for half, found in enumerate(pages.scales()):
        for block in range(BLOCKS):
            for head in range(HEADS):
                assert torch.equal(found[block * pages.step + head, :, 0], scales[block, -1, head, :, half])


def test_a_budget_in_bytes_counts_the_bytes_of_the_cache() -> None:
    def entries(entry_bytes: int) -> int | None:
        found = read_settings(
            {KEY: {"method": "knorm", "budget": "1MiB"}}, layers=2, kv_heads=HEADS, entry_bytes=entry_bytes
        )
        assert found is not None
        return found.policy.entries

    half, whole, more = (entries(2 * cell_bytes(name, 64, torch.bfloat16)) for name in ("auto", "fp8", ROTATED))
    assert half == 2**20 // (2 * HEADS * 256)
    assert whole == 2**20 // (2 * HEADS * 128)
    assert more == 2**20 // (2 * HEADS * 72)


@pytest.mark.parametrize("name", ["turboquant_k8v4", "turboquant_4bit_nc", "ultraquant_4bit", "nvfp4", "nvfp4_4over6"])
def test_other_caches_of_few_bits_are_refused_with_the_reason(name: str) -> None:
    assert (unserved(name, "cuda") or "").startswith(f"{name} (")
    assert unserved(ROTATED, "cuda") is None
    assert unserved(ROTATED, "cpu") == ROTATED
    assert unserved("fp8_e5m2", "cpu") is None
    assert unserved("fp8_e5m2", "cuda") == "fp8_e5m2 (not tested on GPUs)"
