"""How long a decode step and a prefill take: kvthrift beside transformers' own cache.

    python benchmarks/decode_step.py --prompt 4096 --budget 512

All arms run in one process on one model, interleaved: step 1 of every arm, then step 2 of every arm. Arms differ in the
attention function and the cache alone. Eager, without graphs or torch.compile; random token ids. Prints Markdown with
medians, and ratios to transformers' cache holding the whole prompt.

On a GPU torch may choose cuDNN for sdpa, which plans for milliseconds at every new length, that is at every step. What
ratios are taken to therefore runs without it, and the choice torch makes by itself is an arm of its own.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import kvthrift
from kvthrift.integrations.transformers.loading import load_model

RANDOM = "llama-8b"


@dataclass
class Arm:
    """One attention function with one kind of cache, and the seconds that were taken."""

    name: str
    attention: str
    cache: Callable[[], Any]
    tokens: int
    cudnn: bool = True
    past: Any = None
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def random_llama(layers: int, dtype: torch.dtype, device: str) -> Any:
    """Random weights in the shape of Llama-3.1-8B, ``layers`` of its 32."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="kvthrift", dtype=dtype).eval()


@contextmanager
def timed(device: torch.device, into: list[float]) -> Iterator[None]:
    """Seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    into.append(perf_counter() - began)


def use(model: Any, arm: Arm) -> None:
    """Make the model attend as the arm says."""
    model.set_attn_implementation(arm.attention)
    torch.backends.cuda.enable_cudnn_sdp(arm.cudnn)


@torch.inference_mode()
def measure(model: Any, arms: list[Arm], ids: Tensor, prefills: int, steps: int) -> None:
    """Fill every arm's cache ``prefills`` times and decode ``steps`` tokens, after a warm-up of each."""
    for turn in range(prefills + 1):
        for arm in arms:
            use(model, arm)
            arm.past = arm.cache()
            with timed(model.device, arm.prefill if turn else []):
                model(input_ids=ids[:, : arm.tokens], past_key_values=arm.past, use_cache=True, logits_to_keep=1)
    token = ids[:, :1]
    for turn in range(steps + 3):
        for arm in arms:
            use(model, arm)
            with timed(model.device, arm.steps if turn >= 3 else []):
                model(input_ids=token, past_key_values=arm.past, use_cache=True)


def held(past: Any) -> int:
    """Bytes of a cache's tensors."""
    if isinstance(past, kvthrift.Cache):
        return past.report().bytes
    return sum(t.numel() * t.element_size() for layer in past.layers for t in (layer.keys, layer.values))


def table(arms: list[Arm]) -> str:
    """Markdown: medians, and ratios to the first arm."""
    base = arms[0]
    lines = ["| cache | prompt | MiB held | prefill s | ratio | step ms | ratio |", "|---|---|---|---|---|---|---|"]
    for arm in arms:
        prefill, step = median(arm.prefill), median(arm.steps)
        whole = arm.tokens == base.tokens
        lines.append(
            f"| {arm.name} | {arm.tokens} | {held(arm.past) / 2**20:.1f} | {prefill:.3f} | "
            f"{f'{prefill / median(base.prefill):.2f}' if whole else '-'} | "
            f"{1000 * step:.2f} | {step / median(base.steps):.2f} |"
        )
    return "\n".join(lines)


def provenance(model: Any, name: str, prefills: int, steps: int, batch: int) -> str:
    """What was run, on what, at which commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    layers = model.config.num_hidden_layers
    return (
        f"{name} ({layers} layers), {model.dtype}, batch {batch}, {device}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, kvthrift {kvthrift.__version__} at {commit.strip() or 'an unknown commit'}. "
        f"Eager; medians of {prefills} prefills and {steps} decode steps, arms interleaved; ratios to transformers' "
        "own cache of the whole prompt (sdpa)."
    )


def main(
    model: Annotated[
        str, typer.Option(help=f"embedded model by default; '{RANDOM}' for random weights of that shape")
    ] = "",
    layers: Annotated[int, typer.Option(help=f"layers of {RANDOM}")] = 32,
    prompt: Annotated[int, typer.Option(help="tokens read before decoding")] = 4096,
    budget: int = 512,
    methods: str = "snapkv,adakv",
    steps: int = 30,
    prefills: int = 3,
    batch: int = 1,
    dtype: str = "bfloat16",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="also append the Markdown to this file")] = None,
) -> None:
    """Measure one model."""
    torch.manual_seed(0)
    numbers = getattr(torch, dtype)
    net = (
        random_llama(layers, numbers, device)
        if model == RANDOM
        else load_model(model or None, dtype=numbers, device=device)[0]
    )
    ids = torch.randint(10, net.config.vocab_size, (batch, prompt), device=net.device)

    def stock() -> DynamicCache:
        return DynamicCache(config=net.config)

    def ours(method: str) -> Callable[[], kvthrift.Cache]:
        size = None if method == "full" else budget
        return lambda: kvthrift.Cache(net.config, method, budget=size)

    arms = [
        Arm("transformers, whole prompt", "sdpa", stock, prompt, cudnn=False),
        Arm(f"transformers, prompt of {budget}", "sdpa", stock, budget, cudnn=False),
        *([Arm("transformers, cuDNN allowed", "sdpa", stock, prompt)] if net.device.type == "cuda" else []),
        *(Arm(f"kvthrift {name}", "kvthrift", ours(name), prompt) for name in ("full", *methods.split(","))),
    ]
    measure(net, arms, ids, prefills, steps)
    text = f"{provenance(net, model or 'SmolLM2-135M-Instruct', prefills, steps, batch)}\n\n{table(arms)}"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    typer.run(main)
