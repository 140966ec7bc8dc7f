"""What compressing costs: seconds of every method, as a share of the prefill it follows.

    python benchmarks/compression.py --prompts 4096,8192 --budget 512

One process, one model. Each text is read with transformers' own attention and cache (sdpa), then under a few methods,
then with sdpa again, and so on, as many turns as asked, after turns that are not counted; medians. A share is the time
that the cache says it spent compressing, over the sdpa prefill before it, so that a machine whose speed changes between
turns changes both. A method that looks twice has the whole reading beside that, as a multiple of one sdpa prefill, and
without the first reading: the second pass itself. Random words; sablock's segments end at every 17th token.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import DynamicCache

import kvthrift
from kvthrift.eval.provenance import commit
from kvthrift.integrations.transformers.loading import load_model

SEGMENT = 17
EVERY = 3  # methods between two sdpa prefills


def text(model: Any, tokens: int) -> Tensor:
    """Random ids ``[1, T]`` with a delimiter (id 10) at the end of each segment."""
    rng = torch.Generator().manual_seed(tokens)
    ids = torch.randint(11, model.config.vocab_size, (1, tokens), generator=rng)
    ids[:, SEGMENT - 1 :: SEGMENT] = 10
    return ids.to(model.device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def stock(model: Any, ids: Tensor) -> float:
    """Seconds of a prefill with transformers' own attention and cache."""
    model.set_attn_implementation("sdpa")
    synchronize(model.device)
    began = perf_counter()
    model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return perf_counter() - began


@torch.inference_mode()
def ours(model: Any, ids: Tensor, recipe: kvthrift.Recipe) -> tuple[float, float]:
    """Seconds of compression, and of the whole reading."""
    model.set_attn_implementation("kvthrift")
    synchronize(model.device)
    began = perf_counter()
    cache = kvthrift.prefill(model, ids, recipe, delimiters=[10])
    synchronize(model.device)
    whole = perf_counter() - began
    return cache.report().compression_seconds, whole


def recipes(names: str, budget: str) -> dict[str, kvthrift.Recipe]:
    """The methods that compress; all by default."""
    chosen = names.split(",") if names else [name for name in kvthrift.methods() if name != "full"]
    own = {name: {} if kvthrift.method(name).layers.decides else {"budget": budget} for name in chosen}
    found = {name: kvthrift.method(name, **own[name]) for name in chosen}
    if "kvzip" in found:
        found["kvzip, sees=chunk"] = kvthrift.method("kvzip", budget=budget, repeat=512, sees="chunk")
    return found


def measure(model: Any, ids: Tensor, arms: dict[str, kvthrift.Recipe], turns: int, warm: int) -> list[str]:
    """Lines of the table for one text."""
    base: list[float] = []
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
    prefill = 0.0
    for turn in range(turns + warm):
        for number, (name, recipe) in enumerate(arms.items()):
            if number % EVERY == 0:  # again and again, so that both see the machine alike
                prefill = stock(model, ids)
            try:
                seconds, whole = ours(model, ids, recipe)
            except kvthrift.ContextError:  # a repetition needs more positions than the model has
                continue
            if turn >= warm:
                base.append(prefill)
                found[name].append((seconds, seconds / prefill, whole / prefill))
    lines = [f"| *sdpa prefill* | {ids.shape[1]} | {median(base):.3f} | | | |"]
    lines += [f"| {name} | {ids.shape[1]} | no positions left | | | |" for name, rows in found.items() if not rows]
    found = {name: rows for name, rows in found.items() if rows}
    order = sorted(found, key=lambda name: median(x[1] for x in found[name]))
    for name in order:
        seconds, share, whole = (median(x[i] for x in found[name]) for i in range(3))
        twice = bool(arms[name].needs.second_pass)
        second = f"{whole - 1:.2f}x" if twice else ""
        lines.append(f"| {name} | {ids.shape[1]} | {seconds:.3f} | {share:.1%} | {whole:.2f}x | {second} |")
    return lines


def main(
    prompts: str = "4096,8000",
    budget: str = "512",
    methods: Annotated[str, typer.Option(help="all by default")] = "",
    turns: int = 3,
    warm: Annotated[int, typer.Option(help="turns before, not counted")] = 1,
    model: Annotated[str, typer.Option(help="the embedded one by default")] = "",
    dtype: str = "bfloat16",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="also write the Markdown here")] = None,
) -> None:
    """Measure one model."""
    net, _ = load_model(model or None, dtype=getattr(torch, dtype), device=device)
    lines = [
        "| method | prompt | compression s | of an sdpa prefill | whole reading | second pass |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for tokens in map(int, prompts.split(",")):
        lines += measure(net, text(net, tokens), recipes(methods, budget), turns, warm)
    where = torch.cuda.get_device_name() if net.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = (
        f"{model or 'SmolLM2-135M-Instruct'}, {dtype}, budget {budget}, {where}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, kvthrift {kvthrift.__version__} at {commit()}. Medians of "
        f"{turns} turns; ratios are taken within a turn."
    )
    page = "\n".join([about, "", *lines, ""])
    print(page)
    if out is not None:
        out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
