"""Reading a prompt: what compression costs on top, what it holds at its peak, and a prompt that fits no other way.

    python benchmarks/gpu/prefill.py --out results.md

Random weights in the shape of Llama-3.1-8B in bf16, random tokens. Transformers' own cache (sdpa) and kvthrift's run in
turn in one process; seconds are medians, peaks are over the weights.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from step import shape_of_8b
from transformers import DynamicCache

import kvthrift

BUDGET = 1024


def read(work: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Median seconds, peak GiB over what was there, and what the last one returned."""
    times, found = [], None
    for _ in range(repeats):
        found = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return median(times), (torch.cuda.max_memory_allocated() - before) / 2**30, found


def rows(model: Any, length: int, methods: list[str], repeats: int) -> list[str]:
    """The table's rows for one length."""
    ids = torch.randint(10, 1000, (1, length), device="cuda")

    @torch.inference_mode()
    def stock() -> DynamicCache:
        past = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return past

    model.set_attn_implementation("sdpa")
    base, peak, past = read(stock, repeats)
    held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values)) / 2**30
    del past
    lines = [f"| {length // 1024}K | transformers, full | {base:.2f} | - | {peak:.2f} | {held:.3f} |"]
    model.set_attn_implementation("kvthrift")
    for name in methods:
        budget = None if name == "full" else BUDGET
        took, peak, cache = read(
            lambda name=name, budget=budget: kvthrift.prefill(model, ids, name, budget=budget), repeats
        )
        held = cache.report().bytes / 2**30
        del cache
        over = f"{100 * (took / base - 1):+.1f}%"
        lines.append(f"| {length // 1024}K | kvthrift {name} | {took:.2f} | {over} | {peak:.2f} | {held:.3f} |")
        print(lines[-1], flush=True)
    return lines


def main(
    lengths: str = "32768,131072",
    methods: str = "full,snapkv,adakv,expected_attention",
    repeats: int = 3,
    million: Annotated[bool, typer.Option(help="also read 2**20 tokens in chunks")] = True,
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    model = shape_of_8b(32)
    model.config.max_position_embeddings = 2**21
    kvthrift.prefill(model, torch.ones(1, 4096, dtype=torch.long, device="cuda"), "snapkv", budget=BUDGET)
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}, kvthrift "
        f"{kvthrift.__version__}, Python {platform.python_version()}. Budget {BUDGET} entries a head; medians of "
        f"{repeats} (of one from 128K on).",
        "",
        "| prompt | cache | prefill s | over transformers | peak GiB over weights | GiB held |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for length in map(int, lengths.split(",")):
        lines += rows(model, length, methods.split(","), repeats if length < 2**17 else 1)
    if million:
        ids = torch.randint(10, 1000, (1, 2**20), device="cuda")
        took, peak, cache = read(lambda: kvthrift.prefill(model, ids, "snapkv", budget=4096, chunk=8192), 1)
        held = cache.report().bytes / 2**30
        lines.append(f"| 1024K in chunks of 8K | kvthrift snapkv, 4096 | {took:.1f} | - | {peak:.2f} | {held:.3f} |")
        lines += ["", f"The last line reads {2**20 / took:,.0f} tokens a second."]
    text = "\n".join(lines)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    typer.run(main)
