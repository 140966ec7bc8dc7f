"""Tokens a second at the largest batch that fits: the full cache, kvpress and kvthrift; 32K prompts, an eighth kept.

    python benchmarks/gpu/throughput.py --out results.md --kvpress FOLDER

Random weights in the shape of Llama-3.1-8B in bf16, one GPU to itself. Every engine is a process of its own. A prompt
is read, and timed; then caches as long as that leaves them are filled with random entries for as many sequences as
fit (fewer and fewer until nothing runs out), and decode steps are timed. Two baselines: transformers' own cache in
eager steps, as `generate` takes them, and the full cache in kvthrift's graph, which is the stronger one. kvpress runs
in its own environment: FOLDER holds it and its transformers (below 5.3), and goes onto PYTHONPATH alone. SnapKVPress
cuts the cache, so its steps are those of transformers' cache with an eighth; AdaKVPress masks, and holds all.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from publish import publish

LAYERS, HEADS, DIM, LENGTH, SHARE = 32, 8, 128, 32768, 8
ENGINES = {
    "transformers": "transformers, full cache",
    "kvthrift-full": "kvthrift's graph, full cache",
    "kvpress-snapkv": "kvpress SnapKV",
    "kvpress-adakv": "kvpress AdaKV (masks)",
    "kvthrift-snapkv": "kvthrift snapkv",
    "kvthrift-adakv": "kvthrift adakv",
}
ANSWER = 1024  # tokens, in the column with the reading of prompts
AGAIN = 0.95  # of the batch that did not fit
SPARE = 6e9  # bytes left to activations


def shape_of_8b(implementation: str) -> Any:
    """Random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=HEADS, max_position_embeddings=262144,
    )  # fmt: skip
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16).eval()


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds; one turn goes uncounted."""
    import torch

    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def largest(sequence_bytes: float, steps_of: Callable[[int], Callable[[], object]], repeats: int) -> tuple[int, float]:
    """The largest batch that fits, and the seconds of a step."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    batch = int((torch.cuda.mem_get_info()[0] - SPARE) / sequence_bytes)
    while batch > 0:
        try:
            return batch, timed(steps_of(batch), repeats)
        except Exception as error:
            print(f"{batch} sequences: {str(error)[:90]}", file=sys.stderr, flush=True)
            if "out of memory" not in str(error):
                raise
        gc.collect()
        torch.cuda.empty_cache()
        batch = min(batch - 1, int(batch * AGAIN))
    raise SystemExit("not even one sequence fits")


def stock(press: str, repeats: int) -> dict[str, Any]:
    """Transformers' cache, cut or masked by a press or neither."""
    import torch
    from transformers import DynamicCache

    torch.backends.cuda.enable_cudnn_sdp(False)  # in steps of growing length it plans anew each time
    model = shape_of_8b("sdpa")
    ids = torch.randint(10, 1000, (1, LENGTH), device="cuda")
    past = None

    def read() -> None:
        nonlocal past
        past = DynamicCache(config=model.config) if press == "" else DynamicCache()
        if press == "":
            model(input_ids=ids, past_key_values=past, logits_to_keep=1)
        else:
            import kvpress

            inner = kvpress.SnapKVPress(compression_ratio=1 - 1 / SHARE)
            with (inner if press == "snapkv" else kvpress.AdaKVPress(inner))(model):
                model(input_ids=ids, past_key_values=past, logits_to_keep=1)

    torch.backends.cuda.enable_cudnn_sdp(True)
    seconds = timed(read, 2)
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert past is not None
    kept = past.layers[0].keys.shape[2]
    held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
    marked = [layer.self_attn.masked_key_indices for layer in model.model.layers] if press == "adakv" else []
    past = None

    def steps_of(batch: int) -> Callable[[], object]:
        cache = DynamicCache()
        for index in range(LAYERS):
            shape = (batch, HEADS, kept, DIM)
            k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, index)
            del k, v
        for layer, marks in zip(model.model.layers, marked, strict=False):
            rows, heads, places = marks
            each = torch.arange(batch, device=rows.device).repeat_interleave(len(rows))
            layer.self_attn.masked_key_indices = (each, heads.repeat(batch), places.repeat(batch))
        token = torch.full((batch, 1), 7, device="cuda")
        seen = LENGTH - 1

        def step() -> None:
            nonlocal seen
            seen += 1
            place = torch.full((batch, 1), seen, device="cuda")
            model(input_ids=token, past_key_values=cache, position_ids=place, logits_to_keep=1)

        return step

    with torch.inference_mode():
        batch, step_seconds = largest(held, steps_of, repeats)
    return {"read": seconds, "held": held, "batch": batch, "step": step_seconds}


def ours(method: str, repeats: int) -> dict[str, Any]:
    """kvthrift's cache, each step a graph of fused parts."""
    import torch
    from step import filled

    import kvthrift
    from kvthrift.integrations.transformers.graph import GraphSteps

    model = shape_of_8b("kvthrift")
    ids = torch.randint(10, 1000, (1, LENGTH), device="cuda")
    full = method == "full"
    budget = None if full else LENGTH // SHARE
    cache = None

    def read() -> None:
        nonlocal cache
        cache = kvthrift.prefill(model, ids, method, budget=budget)

    with torch.inference_mode():
        seconds = timed(read, 2)
        assert cache is not None
        held = cache.report().bytes
        cache = None

        def steps_of(batch: int) -> Callable[[], object]:
            made = filled(model, batch, LENGTH // (1 if full else SHARE), LENGTH, ragged=method == "adakv")
            steps = GraphSteps(model, made, repeats + 8, compiled=True)
            token = torch.full((batch,), 7, device="cuda")
            return lambda: steps.step(token)

        batch, step_seconds = largest(held, steps_of, repeats)
    return {"read": seconds, "held": held, "batch": batch, "step": step_seconds}


def work(engine: str, repeats: int) -> None:
    """One engine's numbers, as JSON on the last line."""
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.inference_mode():
        if engine.startswith("kvthrift-"):
            found = ours(engine.removeprefix("kvthrift-"), repeats)
        else:
            found = stock(engine.removeprefix("kvpress").removeprefix("-").removeprefix("transformers"), repeats)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"engine": engine, **found, "versions": versions, "device": torch.cuda.get_device_name()}))


def row(found: dict[str, Any], base: float) -> str:
    """A line of the table."""
    rate = found["batch"] / found["step"]
    whole = found["batch"] * ANSWER / (found["batch"] * found["read"] + ANSWER * found["step"])
    return (
        f"| {ENGINES[found['engine']]} | {found['read']:.2f} | {found['held'] / 2**30:.3f} | {found['batch']} | "
        f"{found['step'] * 1e3:.1f} | {rate:,.0f} | {rate / base:.1f} | {whole:,.0f} | {found['versions']} |"
    )


def run(engine: str, repeats: int, kvpress: str, limit: float) -> dict[str, Any] | None:
    """An engine's numbers from a process of its own; None where it fails, with what it said."""
    here = Path(__file__).resolve()
    own = [str(here.parents[2] / "src"), str(here.parent), os.environ.get("PYTHONPATH", "")]
    path = kvpress if engine.startswith("kvpress") else os.pathsep.join(own)
    command = [sys.executable, str(here), "--engine", engine, "--repeats", str(repeats)]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{engine}: not within {limit:.0f} s", flush=True)
        return None
    if done.returncode:
        print(f"{engine}: {done.stderr[-1500:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{engine}: {found}", flush=True)
    return found


def main() -> None:
    """Measure this GPU."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="", help=argparse.SUPPRESS)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=20, help="steps timed")
    parser.add_argument("--kvpress", default="", help="folder with kvpress and what it needs")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for an engine")
    parser.add_argument("--out", type=Path, default=None, help="append the Markdown here")
    options = parser.parse_args()
    if options.engine:
        work(options.engine, options.repeats)
        return
    names = [n for n in options.engines.split(",") if options.kvpress or not n.startswith("kvpress")]
    unknown = sorted(set(names) - set(ENGINES))
    if unknown:
        parser.error(f"no such engine: {', '.join(unknown)}. There are {', '.join(ENGINES)}.")
    rows = [found for name in names if (found := run(name, options.repeats, options.kvpress, options.limit))]
    full = [found["batch"] / found["step"] for found in rows if found["engine"] in ("transformers", "kvthrift-full")]
    if not full:
        raise SystemExit("no baseline was measured")
    lines = [
        f"{rows[0]['device']}; prompts of {LENGTH:,} tokens, {LENGTH // SHARE:,} entries kept; shape of "
        f"Llama-3.1-8B, bf16. Decode steps at the largest batch that fits, medians of {options.repeats}; 'times "
        "full': of the better full cache; with prompts: reading all of them, one after another, counted for "
        f"{ANSWER:,} tokens of answer each.",
        "",
        "| engine | s a prompt | GiB a sequence | largest batch | ms a step | tokens/s | times full | with prompts "
        "| versions |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *(row(found, max(full)) for found in rows),
    ]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
