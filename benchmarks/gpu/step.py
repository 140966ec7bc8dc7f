"""One decode step of a whole model: kernel by kernel, as a graph, and as a graph of fused parts, beside transformers.

    python benchmarks/gpu/step.py --out results.md

Random weights in the shape of Llama-3.1-8B in bf16. Caches are filled with random entries rather than by reading a
prompt: a step's time depends on how many are held, not on what they are. The floor is what a copy's bandwidth would
need for the weights and the entries a step reads. Logits of every way are compared with the eager ones first.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import triton
import typer
from publish import publish
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import kvthrift
from kvthrift.integrations.transformers.graph import GraphSteps

LAYERS, HEADS, DIM = 32, 8, 128
CASES = {"1 x 1024": (1, 1024, 131072), "1 x 4096": (1, 4096, 131072), "8 x 4096": (8, 4096, 32768),
         "64 x 4096": (64, 4096, 32768), "1 x 32768": (1, 32768, 32768)}  # fmt: skip


def shape_of_8b(layers: int) -> Any:
    """Random weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=HEADS,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="kvthrift", dtype=torch.bfloat16).eval()


@torch.inference_mode()
def filled(model: Any, batch: int, kept: int, seen: int, *, ragged: bool) -> kvthrift.Cache:
    """A cache that holds ``kept`` random entries a head (on average, if ragged: a few heads hold much, most little)."""
    cache = kvthrift.prefill(model, torch.ones(batch, 8, dtype=torch.long, device="cuda"), "full")
    generator = np.random.default_rng(0)
    for layer in cache.state.layers:
        assert layer.store is not None
        lengths = np.full((batch, HEADS), kept)
        if ragged:
            share = generator.dirichlet(np.full(HEADS, 0.5), size=batch)
            lengths = np.maximum((share * (kept - 64) * HEADS).astype(np.int64), 0) + 64
        count = int(lengths.sum())
        keys, values = (torch.randn(count, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        positions = torch.cat([torch.arange(n) for n in lengths.reshape(-1)]).cuda()
        layer.store.replace(keys, values, positions, lengths)
    cache.state.columns.length = seen
    return cache


@torch.inference_mode()
def stock(model: Any, batch: int, length: int) -> DynamicCache:
    """Transformers' own cache with as many random entries."""
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        k, v = (torch.randn(batch, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache.update(k, v, layer)
    return cache


def milliseconds(step: Callable[[], object], repeats: int, warm: int = 4) -> float:
    """Of a step, median; the device is waited for."""
    times = []
    for turn in range(repeats + warm):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        if turn >= warm:
            times.append(start.elapsed_time(stop))
    return median(times)


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (milliseconds(lambda: target.copy_(source), 20) * 1e-3)


@torch.inference_mode()
def rounding(model: Any) -> float:
    """How far bf16 by itself moves these logits: the largest difference to float32, as a share of the largest."""
    ids = torch.randint(10, 1000, (1, 8), device="cuda")
    found = model(ids).logits.float()
    wanted = copy.deepcopy(model).float()(ids).logits
    torch.cuda.empty_cache()
    return float((found - wanted).abs().max() / wanted.abs().max())


def fusing(mode: str) -> bool | dict[str, Any]:
    """What ``compiled=`` gets: a mode, and options that are switched: ``MODE+triton.enable_pdl+joined=false``."""
    name, *switches = mode.split("+")
    options = dict(torch._inductor.list_mode_options(name)) if name else {}
    for switch in switches:
        option, _, value = switch.partition("=")
        if value not in ("", "true", "false"):
            raise typer.BadParameter(f"{switch!r} in --mode: an option is switched by =true or =false.")
        options[option] = value != "false"
    return options or True


@torch.inference_mode()
def eager(model: Any, cache: kvthrift.Cache, token: torch.Tensor) -> float:
    """Milliseconds of a step launched kernel by kernel."""
    step = partial(model, input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return milliseconds(step, 10)


@torch.inference_mode()
def recorded(model: Any, cache: kvthrift.Cache, token: torch.Tensor, repeats: int, fuse: Any, limit: float) -> float:
    """Milliseconds of a step as a graph, once its logits were compared with an eager step's."""
    wanted = model(input_ids=token, past_key_values=cache.fork(), use_cache=True).logits[:, -1].float()
    steps = GraphSteps(model, cache, repeats + 8, compiled=fuse)
    found = steps.step(token[:, 0]).float()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"{fuse}: logits differ by {error:.2%}", flush=True)
    assert error < limit, f"logits differ by {error:.1%}, more than {limit:.1%}"
    took = milliseconds(lambda: steps.step(token[:, 0]), repeats)
    steps.finish()
    return took


@torch.inference_mode()
def measure(model: Any, name: str, peak: float, repeats: int, noise: float, *, compiled: bool, mode: str) -> str:
    """A row of the table; a cache is made anew for each cell, since steps make it longer."""
    batch, kept, seen = CASES[name]
    token = torch.full((batch, 1), 7, device="cuda")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cells = []
    for ragged in (False, True):
        make = partial(filled, model, batch, kept, seen, ragged=ragged)
        stores = [layer.store for layer in make().state.layers if layer.store is not None]
        floor = (weights + sum(store.entries for store in stores) * DIM * 4) / peak * 1e3
        held = sum(store.bytes for store in stores) / 2**30
        del stores
        if not ragged:
            cells += [f"{floor:.2f}", f"{eager(model, make(), token):.1f}"]
        for fuse in (False, fusing(mode)) if compiled else (False,):
            torch.cuda.empty_cache()
            took = recorded(model, make(), token, repeats, fuse, 2 * noise)
            cells.append(f"{took:.2f} ({floor / took:.0%})")
        if not compiled:
            cells.append("-")
        cells.append(f"{held:.3f}")
        torch.cuda.empty_cache()
    model.set_attn_implementation("sdpa")
    for length in (kept, seen):
        if batch * length * LAYERS * HEADS * DIM * 4 * 2 > 40e9:
            cells.append("-")
            continue
        past = stock(model, batch, length)
        torch.backends.cuda.enable_cudnn_sdp(False)
        step = lambda past=past: model(input_ids=token, past_key_values=past, use_cache=True)  # noqa: E731
        cells.append(f"{milliseconds(step, 8, 2):.1f}")
        torch.backends.cuda.enable_cudnn_sdp(True)
        del past, step
        torch.cuda.empty_cache()
    model.set_attn_implementation("kvthrift")
    return f"| {name} of {seen // 1024}K | " + " | ".join(cells) + " |"


def main(
    repeats: int = 30,
    cases: str = ",".join(CASES),
    layers: int = LAYERS,
    compiled: Annotated[bool, typer.Option(help="also fuse elementwise parts by torch.compile")] = True,
    mode: Annotated[str, typer.Option(help="of torch.compile, and options behind +, such as +joined=false")] = "",
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    peak = bandwidth()
    model = shape_of_8b(layers)
    noise = rounding(model)
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, triton {triton.__version__}, transformers "
        f"{transformers.__version__}, kvthrift {kvthrift.__version__}, Python {platform.python_version()}; {layers} "
        f"layers. A copy moves {peak / 1e12:.2f} TB/s. Milliseconds a step, median of {repeats}; in brackets the share "
        f"of the floor's speed; fused by torch.compile ({mode or 'default'}). Largest difference of bf16 logits to "
        f"float32 ones: {noise:.1%}.",
        "",
        "| held | floor | eager | graph | graph, fused | GiB | ragged: graph | graph, fused | GiB | transformers, "
        "as many | transformers, all |",
        "|---|" + "---:|" * 10,
    ]
    for name in cases.split(","):
        lines.append(measure(model, name, peak, repeats, noise, compiled=compiled, mode=mode))
        print(lines[-1], flush=True)
    publish(lines, out)


if __name__ == "__main__":
    typer.run(main)
