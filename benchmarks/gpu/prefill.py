"""Reading a prompt: what compression costs on top, what it holds at its peak, and a prompt that fits no other way.

    python benchmarks/gpu/prefill.py --out results.md

Random weights in the shape of Llama-3.1-8B in bf16, random tokens. Transformers' own cache (sdpa) and kvthrift's run in
turn in one process, its own before and after kvthrift's; seconds are medians of readings behind one that is not counted
(none is left out from 128K on, where `--long` says how many there are), peaks are over the weights. A method's options
follow its name (`--methods h2o,h2o:products=int8`). `--only` names the parts: 32K, 128K (or any such length), and 1M, a
million tokens in chunks, which reads 256K first and stops after `--seconds`: what it has read by then is its result,
and what the rest would take is marked as an extrapolation.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from publish import publish
from step import shape_of_8b
from transformers import DynamicCache

import kvthrift

BUDGET = 1024
CHUNK = 8192
MILLION = 2**20


class Enough(Exception):
    """The time there was is over."""


def read(work: Callable[[], Any], repeats: int, warm: int) -> tuple[list[float], float, Any]:
    """Seconds of each reading, peak GiB over what was there, and what the last one returned; ``warm`` go uncounted."""
    times, found = [], None
    torch.cuda.empty_cache()
    for turn in range(warm + repeats):
        found = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = work()
        stop.record()
        torch.cuda.synchronize()
        if turn >= warm:
            times.append(start.elapsed_time(stop) / 1000)
    return times, (torch.cuda.max_memory_allocated() - before) / 2**30, found


def prefill(model: Any, ids: torch.Tensor, method: str) -> kvthrift.Cache:
    """Read with a method and its options, ``name:option=value:option=value``."""
    name, *options = method.split(":")
    chosen = dict(option.split("=", 1) for option in options)
    return kvthrift.prefill(model, ids, name, budget=None if name == "full" else BUDGET, **chosen)


def rows(model: Any, length: int, methods: list[str], repeats: int, warm: int) -> list[str]:
    """The table's rows for one length."""
    ids = torch.randint(10, 1000, (1, length), device="cuda")
    size = f"{length // 1024}K"

    @torch.inference_mode()
    def stock() -> DynamicCache:
        past = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return past

    def base() -> tuple[list[float], str]:
        model.set_attn_implementation("sdpa")
        times, peak, past = read(stock, repeats, warm)
        held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values)) / 2**30
        model.set_attn_implementation("kvthrift")
        return times, f"{peak:.2f} | {held:.3f} |"

    first, _ = base()
    found = []
    for name in methods:
        times, peak, cache = read(partial(prefill, model, ids, name), repeats, warm)
        found.append((name, median(times), f"{peak:.2f} | {cache.report().bytes / 2**30:.3f} |"))
        del cache
        print(f"    {size} {name}: {median(times):.3f} s, before {median(first):.3f}", flush=True)
    last, rest = base()
    stands = median(first + last)
    lines = [f"| {size} | transformers, full | {stands:.3f} ({median(first):.3f}, {median(last):.3f}) | - | {rest}"]
    lines += [
        f"| {size} | kvthrift {name} | {took:.3f} | {100 * (took / stands - 1):+.1f}% | {more}"
        for name, took, more in found
    ]
    print("\n".join(lines), flush=True)
    return lines


class Progress:
    """A forward hook that says how far a reading in chunks has come, and ends it when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tokens, self.chunks = seconds, 0, 0
        self.began = self.now = time.perf_counter()

    def __call__(self, _module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        torch.cuda.synchronize()
        self.tokens, self.chunks = self.tokens + kwargs["input_ids"].shape[1], self.chunks + 1
        self.now = time.perf_counter()
        if self.chunks % 16 == 0:
            print(f"    {self.tokens // 1024}K tokens, {self.speed:,.0f} a second", flush=True)
        if self.now - self.began > self.seconds:
            raise Enough

    @property
    def speed(self) -> float:
        """Tokens a second so far."""
        return self.tokens / max(self.now - self.began, 1e-9)


def in_chunks(model: Any, length: int, seconds: float) -> tuple[str, float]:
    """The table's row for a prompt that is read in chunks, or as much of it as there is time for; tokens a second."""
    ids = torch.randint(10, 1000, (1, length), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, progress = torch.cuda.memory_allocated(), Progress(seconds)
    hook = model.register_forward_hook(progress, with_kwargs=True)
    name, held = f"{length // 1024}K in chunks of {CHUNK // 1024}K", "-"
    try:
        cache = kvthrift.prefill(model, ids, "snapkv", budget=4096, chunk=CHUNK)
        torch.cuda.synchronize()
        progress.now = time.perf_counter()
        held = f"{cache.report().bytes / 2**30:.3f}"
    except Enough:
        name += f", cut off at {progress.tokens // 1024}K"
    finally:
        hook.remove()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    took = progress.now - progress.began
    return f"| {name} | kvthrift snapkv, 4096 | {took:.1f} | - | {peak:.2f} | {held} |", progress.speed


def million(model: Any, seconds: float) -> list[str]:
    """A quarter of a million tokens in chunks, what a million would take by that, and a million."""
    first, speed = in_chunks(model, MILLION // 4, seconds)
    print(first, flush=True)
    guess = f"At the speed of the first quarter a million tokens take {MILLION / speed:.0f} s (extrapolated)."
    print(guess, flush=True)
    row, speed = in_chunks(model, MILLION, seconds)
    print(row, flush=True)
    return [first, row, "", guess, "", f"The last line reads {speed:,.0f} tokens a second."]


def main(
    only: Annotated[str, typer.Option(help="parts: lengths such as 32K and 128K, and 1M")] = "32K,128K,1M",
    methods: str = "full,snapkv,adakv,expected_attention",
    short: Annotated[str, typer.Option(help="methods that are read up to 32K only")] = "h2o",
    repeats: int = 3,
    long: Annotated[int, typer.Option(help="as `--repeats`, from 128K on")] = 1,
    seconds: Annotated[float, typer.Option(help="the most that each reading in chunks may take")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    model = shape_of_8b(32)
    model.config.max_position_embeddings = 2**21
    warm = torch.ones(1, 4096, dtype=torch.long, device="cuda")
    for name in (*methods.split(","), *filter(None, short.split(","))):  # kernels are compiled here
        if name != "full":
            prefill(model, warm, name)
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}, kvthrift "
        f"{kvthrift.__version__}, Python {platform.python_version()}. Budget {BUDGET} entries a head; medians of "
        f"{repeats} (of {long} from 128K on).",
        "",
        "| prompt | cache | prefill s | over transformers | peak GiB over weights | GiB held |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for part in only.split(","):
        if part == "1M":
            lines += million(model, seconds)
            continue
        length = int(part.removesuffix("K")) * 1024
        chosen = methods + (f",{short}" if short and length <= 2**15 else "")
        lines += rows(model, length, chosen.split(","), *((repeats, 1) if length < 2**17 else (long, 0)))
    publish(lines, out)


if __name__ == "__main__":
    typer.run(main)
