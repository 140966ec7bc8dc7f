"""A model on CUDA: the same tokens as without kvthrift, the same entries as on the CPU, and memory really freed."""

from __future__ import annotations

import copy
import gc
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.fitted import APART
from tests.models import text, tiny
from tests.reading import TWICE
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

import kvthrift

pytestmark = pytest.mark.gpu

BATCH, PROMPT, ANSWER, BUDGET, PAGE = 2, 150, 64, 48, 16
METHODS = [name for name in kvthrift.methods() if name not in (*APART, *TWICE)]  # of another model; not in one pass
CUT = [name for name in METHODS if name != "full"]


@cache
def llama(attention: str = "kvthrift", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of the other tests, on CUDA."""
    return copy.deepcopy(tiny("llama", attention)).to("cuda", dtype)


def empty(method: str, budget: int = BUDGET, **options: object) -> kvthrift.Cache:
    size = None if method == "full" else budget
    return kvthrift.Cache(tiny("llama").config, method, budget=size, page=PAGE, **options)


def generate(model: PreTrainedModel, ids: Tensor, past: object, count: int, mask: Tensor | None = None) -> Tensor:
    """Token ids ``[B, count]`` on the CPU."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
    made = model.generate(ids, attention_mask=mask, past_key_values=past, max_new_tokens=count, do_sample=False)
    return made[:, ids.shape[1] :].cpu()


def read(model: PreTrainedModel, past: object, ids: Tensor) -> Tensor:
    """Logits ``[B, T, vocabulary]`` in float32 on the CPU."""
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), past_key_values=past).logits.float().cpu()


def entries(past: kvthrift.Cache) -> set[tuple[int, ...]]:
    """Every entry held, as (layer, sequence, head, position)."""
    found = set()
    for layer in past.state.layers:
        assert layer.store is not None
        held, valid = layer.store.positions(), layer.store.valid()
        places = valid.nonzero()
        rows = torch.cat((torch.full_like(places[:, :1], layer.number), places[:, :2], held[valid][:, None]), dim=1)
        found |= set(map(tuple, rows.tolist()))
    return found


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)


@cache
def without_kvthrift(dtype: torch.dtype) -> Tensor:
    model = llama("sdpa", dtype)
    return generate(model, text(BATCH, PROMPT), DynamicCache(config=model.config), ANSWER)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_while_everything_fits(method: str) -> None:
    past = empty(method, PROMPT + ANSWER)
    assert torch.equal(generate(llama(), text(BATCH, PROMPT), past, ANSWER), without_kvthrift(torch.float32))
    assert past.report().compressions == 0


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_the_same_tokens_up_to_ties(method: str) -> None:
    """Kernels round differently in bf16, so where a token differs, the model itself must have been undecided."""
    got = generate(llama(dtype=torch.bfloat16), text(BATCH, PROMPT), empty(method, PROMPT + ANSWER), ANSWER)
    expected = without_kvthrift(torch.bfloat16)
    model = llama("sdpa", torch.bfloat16)
    logits = read(model, DynamicCache(config=model.config), torch.cat((text(BATCH, PROMPT), expected), dim=1))
    for b in range(BATCH):
        other = (got[b] != expected[b]).nonzero()[:, 0].tolist()
        if other:
            row = logits[b, PROMPT - 1 + other[0]]
            assert row.max() - row[got[b, other[0]]] < 0.1 * row.std()


@pytest.mark.parametrize("method", CUT)
def test_what_is_kept_is_what_the_cpu_keeps(method: str) -> None:
    ids, more = text(BATCH, PROMPT), text(BATCH, 3, seed=1)
    here, there = empty(method), empty(method)
    got, expected = read(llama(), here, ids), read(tiny("llama"), there, ids)
    close(got, expected)
    here.check_integrity()
    kept, wanted = entries(here), entries(there)
    assert len(kept) == len(wanted)
    assert len(kept & wanted) >= 0.99 * len(wanted)  # rounding may turn a near tie
    if kept == wanted:
        close(read(llama(), here, more), read(tiny("llama"), there, more))
        close(read(llama(), here, more[:, :1]), read(tiny("llama"), there, more[:, :1]))


@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o"])
@pytest.mark.parametrize("merge", ["evict", "fold"])
def test_a_saved_cache_goes_on_elsewhere(method: str, merge: str, tmp_path: Path) -> None:
    past = empty(method, merge=merge)
    read(llama(), past, text(BATCH, PROMPT))
    past.save(tmp_path / "cache.safetensors")
    again = kvthrift.load(tmp_path / "cache.safetensors", llama())
    there = kvthrift.load(tmp_path / "cache.safetensors", tiny("llama"))
    assert entries(past) == entries(again) == entries(there)
    for more in (text(BATCH, 5, seed=1), text(BATCH, 1, seed=2)):
        expected = read(llama(), past, more)
        close(read(llama(), again, more), expected)
        close(read(tiny("llama"), there, more), expected)


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "h2o", "expected_attention", "cake"])
def test_a_padded_row_says_what_it_says_alone(method: str) -> None:
    parts = [text(1, n, seed=n) for n in (150, 97, 40)]
    ids = torch.cat([torch.nn.functional.pad(part, (PROMPT - part.shape[1], 0)) for part in parts])
    mask = (ids > 0).long()  # text never holds the padding token
    past = empty(method)
    together = generate(llama(), ids, past, 8, mask)
    past.check_integrity()
    for b, part in enumerate(parts):
        assert torch.equal(together[b], generate(llama(), part, empty(method), 8)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
def test_forks_share_pages_and_part_ways(method: str, dtype: torch.dtype) -> None:
    model, ids = llama(dtype=dtype), text(BATCH, PROMPT).cuda()
    size = None if method == "full" else BUDGET
    past = kvthrift.prefill(model, ids, method, budget=size, page=PAGE)
    before = [layer.store.read().keys.clone() for layer in past.state.layers if layer.store is not None]
    forks = [past.fork() for _ in range(3)]
    made = [read(model, fork, text(BATCH, 20, seed=n)) for n, fork in enumerate(forks)]
    for layer in range(2):
        first, *others = (c.state.layers[layer].store for c in (past, *forks))
        first.check_integrity(*others)
        assert torch.equal(first.read().keys, before[layer])
    for n, logits in enumerate(made):
        alone = kvthrift.prefill(model, ids, method, budget=size, page=PAGE)
        assert torch.equal(read(model, alone, text(BATCH, 20, seed=n)), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_read_in_chunks_says_the_same(dtype: torch.dtype) -> None:
    model, ids = llama(dtype=dtype), text(BATCH, PROMPT).cuda()
    whole, pieces = (kvthrift.prefill(model, ids, page=PAGE, chunk=chunk) for chunk in (None, 32))
    more = text(BATCH, 20, seed=1)
    exact = read(llama(), kvthrift.prefill(llama(), ids, page=PAGE), more)
    for past in (whole, pieces):
        wrong = (read(model, past, more) - exact).norm() / exact.norm()
        assert wrong < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_batch_read_in_chunks_says_what_it_says_at_once(dtype: torch.dtype) -> None:
    """Heads of unequal lengths: in half precision a kernel of their own attends to them."""
    model, ids, more = llama(dtype=dtype), text(3, PROMPT).cuda(), text(3, 9, seed=1).cuda()
    mask = torch.ones(3, PROMPT, dtype=torch.long, device="cuda")
    mask[1, :53], mask[2, :110] = 0, 0
    longer = torch.cat((mask, mask.new_ones(3, 9)), dim=1)
    found = []
    for chunk in (None, 40):
        past = kvthrift.prefill(model, ids, "full", page=PAGE, attention_mask=mask, chunk=chunk)
        places = (longer.cumsum(dim=-1) - 1)[:, PROMPT:]
        with torch.inference_mode():
            out = model(input_ids=more, past_key_values=past, attention_mask=longer, position_ids=places)
        found.append(out.logits.float())
    tolerance = 1e-3 if dtype == torch.float32 else 0.05 * float(found[0].std())
    torch.testing.assert_close(found[0], found[1], atol=4 * tolerance, rtol=0)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "cake"])
def test_chunks_keep_the_peak_small(method: str) -> None:
    past = kvthrift.prefill(llama(), text(1, 3000).cuda(), method, budget=BUDGET, page=PAGE, chunk=100)
    past.check_integrity()
    report = past.report()
    assert report.entries <= BUDGET * 2 * 2
    assert report.peak_bytes < report.full_bytes / 4


@pytest.mark.parametrize("method", ["tova", "h2o", "snapkv", "adakv", "streamingllm"])
def test_decoding_stays_within_the_budget(method: str) -> None:
    caches = [empty(method, every=4) for _ in range(2)]
    here, there = (
        generate(m, text(BATCH, PROMPT), c, 40) for m, c in zip((llama(), tiny("llama")), caches, strict=True)
    )
    assert torch.equal(here, there)
    caches[0].check_integrity()
    assert all(row.mean <= BUDGET + 4 for row in caches[0].report().layers)


# -- memory -----------------------------------------------------------------------------------------------------

LAYERS, LONG = 8, 16384


@cache
def larger() -> PreTrainedModel:
    """Random weights with the KV heads of an 8B Llama."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2 * LONG,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="kvthrift", dtype=torch.bfloat16).eval()


def used() -> int:
    """Bytes asked for; the allocator may hand out up to a MiB more with each large tensor."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def peak() -> int:
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"])


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "cake", "lava"])
def test_memory_is_really_freed(method: str) -> None:
    model = larger()
    ids = torch.randint(512, (1, LONG), device="cuda")
    size = None if method == "full" else 512
    kvthrift.prefill(model, ids, method, budget=size)  # what libraries keep from their first use is not the cache's
    before = used()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    without = peak() - before
    before, allocated = used(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    past = kvthrift.prefill(model, ids, method, budget=size)
    most, held = peak() - before, used() - before
    allocated = torch.cuda.memory_allocated() - allocated
    report = past.report()
    layer = report.full_bytes // LAYERS
    sizes = {
        "held": held,
        "allocated": allocated,
        "reported": report.bytes,
        "full": report.full_bytes,
        "peak": most,
        "without a cache": without,
    }
    print(method, {name: f"{size / 2**20:.1f} MiB" for name, size in sizes.items()})
    assert 0.95 * report.bytes <= held <= 1.05 * report.bytes + 2**20
    assert held < (1.1 if method == "full" else 0.05) * report.full_bytes
    assert allocated <= held + LAYERS * 2 * 2**20  # keys and values of each layer
    assert most - without < held + 3 * layer
    with torch.inference_mode():
        for _ in range(3):
            model(input_ids=ids[:, :1], past_key_values=past)
    assert used() - before <= 1.05 * past.report().bytes + 2**20
