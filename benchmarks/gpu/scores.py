"""Scoring a prompt's entries: time of each kernel for one layer, beside its floor and its naive twin.

    python benchmarks/gpu/scores.py --out results.md

Heads as in Llama-3.1-8B (32 query heads, 8 KV heads, 128 wide, bf16), random. The floor is the time that a copy's
bandwidth needs for what must be read and written once, or that the published peak needs for the arithmetic where that
is more (column sums, quadratic forms). Times are of a CUDA graph of several calls, medians; a twin that waits for the
host is timed call by call. What is printed was compared with float64 on a part of the heads or entries first: the error
is the largest difference over the largest number. `--sweep` tries other blocks for column sums and query moments.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import triton
import typer
from decode_kernel import copy_bandwidth
from publish import publish
from torch import Tensor
from torch.nn import functional as F

from kvthrift import kernels
from kvthrift.core import LayerView, Products, QueryMoments, Rope
from kvthrift.kernels import naive_scores
from kvthrift.score import AttentionReceived, ExpectedAttention, WindowAttention

HEADS, GROUP, DIM, WINDOW = 8, 4, 128, 32
SCALE = DIM**-0.5
PEAK = 790e12  # bf16 multiply-adds count twice
LENGTHS = {"8K": 8192, "32K": 32768, "128K": 131072}
Call = Callable[[], object]


@dataclass
class Layer:
    """One layer's queries and entries, and what is known of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    valid: Tensor
    rope: Rope
    lse: Tensor

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def where(self) -> dict[str, Tensor | float]:
        spread = self.positions[:, None].expand(1, HEADS, self.length)
        return {"k_positions": spread, "valid": self.valid, "scale": SCALE}


@dataclass
class Row:
    """A line of the table: seconds of the kernel, its floor and its twin, and the kernel's largest relative error."""

    name: str
    ours: float
    floor: float
    twin: float | None
    error: float | None


def layer_of(length: int) -> Layer:
    """Random queries and keys with the strides that a model's have."""
    q, k, v = (
        torch.randn(1, length, heads, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS * GROUP, HEADS, HEADS)
    )
    positions = torch.arange(length, device="cuda")[None]
    valid = torch.ones(1, HEADS, length, dtype=torch.bool, device="cuda")
    rope = Rope(1 / 500000.0 ** (torch.arange(0, DIM, 2, device="cuda").float() / DIM))
    lse = kernels.attend(q, k, v, scale=SCALE, causal=True, need_lse=True).lse
    assert lse is not None
    return Layer(q, k, v, positions, valid, rope, lse)


def one_by_one(call: Call, repeats: int) -> float:
    """Seconds of a call, median."""
    times = []
    for turn in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(stop) / 1000)
    return median(times)


def graphed(call: Call, repeats: int, calls: int = 4) -> float:
    """Seconds of a call within a graph of several, median: without the host's share."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    took = one_by_one(graph.replay, repeats) / calls
    graph.reset()
    return took


def error(found: Tensor, wanted: Tensor, least: float) -> float:
    """The largest difference over the largest number; more than ``least`` ends the run."""
    off = float((found.double() - wanted).abs().max() / wanted.abs().max())
    if not off <= least:
        raise SystemExit(f"wrong numbers: off by {off:.2e} of the largest, more than {least:.0e}")
    return off


def window(layer: Layer, bandwidth: float, repeats: int) -> Row:
    """The newest queries' attention, summed over them."""
    given = {**layer.where, "q_positions": layer.positions[:, -WINDOW:]}
    q = layer.q[:, :, -WINDOW:].clone()
    call = partial(kernels.window_sums, q, layer.k, **given)  # type: ignore[arg-type]
    logits = q[:, :GROUP].double() @ layer.k[:, :1].double().transpose(-1, -2) * SCALE
    ahead = layer.positions[:, None, None] > layer.positions[:, None, -WINDOW:, None]
    wanted = logits.masked_fill(ahead, -torch.inf).softmax(dim=-1).sum(dim=2)
    off = error(call()[0][:, 0], wanted, 1e-3)

    def twin() -> object:
        return naive_scores.window_sums(kernels.window_attention(q, layer.k, **given), (1,))  # type: ignore[arg-type]

    size = layer.k.numel() * 2 + HEADS * GROUP * layer.length * 4
    return Row(f"window of {WINDOW}", graphed(call, repeats), size / bandwidth, one_by_one(twin, repeats), off)


def columns(layer: Layer, repeats: int, *, twin: bool, products: Products = "exact") -> Row:
    """All queries' attention, summed over them."""

    def call() -> Tensor:
        found = kernels.power_sums(
            layer.q, layer.k, q_positions=layer.positions, lse=layer.lse, power=1, products=products, **layer.where
        )  # type: ignore[arg-type]  # fmt: skip
        return found.mean(dim=2)

    some = torch.arange(0, layer.length, max(1, layer.length // 60), device="cuda")
    wanted = torch.zeros(len(some), dtype=torch.float64, device="cuda")
    for head in range(GROUP):
        for start in range(0, layer.length, 16384):
            rows = layer.q[0, head, start : start + 16384].double() @ layer.k[0, 0, some].double().T * SCALE
            rows = (rows - layer.lse[0, head, start : start + 16384, None]).exp()
            late = layer.positions[0, start : start + 16384, None] < some
            wanted += rows.masked_fill(late, 0.0).sum(dim=0) / GROUP
    off = error(call()[0, 0, some], wanted, 1e-3 if products == "exact" else 2e-2)

    def slow() -> object:
        return naive_scores.power_sums(
            layer.q, layer.k, q_positions=layer.positions, lse=layer.lse, power=1, buffer=0, bias=None, block=256,
            products=products, **layer.where,
        )  # type: ignore[arg-type]  # fmt: skip

    floor = layer.length**2 * DIM * HEADS * GROUP / (PEAK if products == "exact" else 2 * PEAK)
    name, few = "column sums" if products == "exact" else "column sums, int8", max(2, repeats // 4)
    return Row(name, graphed(call, few, 1), floor, one_by_one(slow, 1) if twin else None, off)


def moments(layer: Layer, bandwidth: float, repeats: int) -> Row:
    """Mean and covariance of the queries before the rotary embedding."""
    use, turns = layer.positions >= 4, kernels.query_turns(layer.q, layer.positions, layer.rope)  # once for all layers
    call = partial(kernels.query_moments, layer.q, layer.positions, use, layer.rope, turns)
    total, outer = call()
    some = layer.q[:, :2]
    plain = layer.rope.rotate(some.float(), -layer.positions[:, None]).double() * use[:, None, :, None]
    off = error(outer[:, :2], plain.transpose(-1, -2) @ plain, 2e-3)
    error(total[:, :2], plain.sum(dim=2), 2e-3)
    twin = partial(naive_scores.query_moments, layer.q, layer.positions, use, layer.rope)
    floor = layer.q.numel() * 2 / bandwidth
    return Row("query moments", graphed(call, repeats), floor, one_by_one(twin, max(2, repeats // 4)), off)


def forms(layer: Layer, bandwidth: float, repeats: int) -> Row:
    """Logits expected from Gaussian queries."""
    mean = torch.randn(1, HEADS * GROUP, DIM, device="cuda")
    root = torch.randn(1, HEADS * GROUP, DIM, DIM, device="cuda") / DIM**0.5
    spread = root @ root.transpose(-1, -2)
    call = partial(kernels.gaussian_logits, layer.k, mean, spread, SCALE)
    keys = layer.k[:, 0].double()
    wanted = (keys * mean[:, :1].double()).sum(-1) * SCALE + ((keys @ spread[:, 0].double()) * keys).sum(
        -1
    ) * SCALE**2 / 2
    off = error(call()[:, 0, 0], wanted, 1e-4)
    twin = partial(naive_scores.gaussian_logits, layer.k, mean, spread, SCALE)
    floor = max(
        (layer.k.numel() * 2 + HEADS * GROUP * layer.length * 4) / bandwidth,
        4 * HEADS * GROUP * layer.length * DIM**2 / PEAK,  # two products: the matrix is in two parts
    )
    return Row("quadratic forms", graphed(call, repeats), floor, one_by_one(twin, max(2, repeats // 4)), off)


def choice(layer: Layer, bandwidth: float, repeats: int) -> Row:
    """Which entries are the best 1024 of their head."""
    scores = torch.rand(1, HEADS, layer.length, device="cuda")
    counts = torch.full((1, HEADS), 1024, device="cuda")
    call, twin = partial(kernels.best, scores, counts), partial(naive_scores.best, scores, counts)
    if not torch.equal(call(), twin()):
        raise SystemExit("the best entries are not those of a stable sort")
    return Row("the best 1024", graphed(call, repeats), scores.numel() * 5 / bandwidth, one_by_one(twin, repeats), None)


def whole(layer: Layer, repeats: int) -> list[Row]:
    """What scorers take in all, the host's share included, behind a layer that left what layers share."""
    spread = layer.positions[:, None].expand(1, HEADS, layer.length)
    total, outer = kernels.query_moments(layer.q, layer.positions, layer.positions >= 4, layer.rope)
    seen = torch.tensor([layer.length], device="cuda")
    view = LayerView(
        0, 32, layer.k, layer.v, spread, seen[:, None].expand(1, HEADS), seen, SCALE, GROUP,
        queries=layer.q[:, :, -WINDOW:], query_positions=layer.positions[:, -WINDOW:],
        moments=QueryMoments(seen.float() - 4, total, outer), rope=layer.rope,
        columns=torch.rand(1, HEADS, layer.length, device="cuda"),
    )  # fmt: skip
    view.known_seen, view.known_lengths = (layer.length,), np.full((1, HEADS), layer.length)
    scorers = {"snapkv": WindowAttention(), "expected attention": ExpectedAttention(), "h2o": AttentionReceived()}
    return [
        Row(f"{name}: score", one_by_one(partial(scorer.score, view), repeats), 0.0, None, None)
        for name, scorer in scorers.items()
    ]


def lse_error(layer: Layer, lse: Tensor) -> float:
    """The largest difference of some log-sum-exps from float64."""
    some = torch.linspace(0, layer.length - 1, 16, device="cuda").long()
    logits = layer.q[0, :GROUP, some].double() @ layer.k[0, 0].double().T * SCALE  # [G, 16, T]
    logits = logits.masked_fill(layer.positions[0] > some[:, None], -torch.inf)
    off = float((lse[0, :GROUP, some].double() - logits.logsumexp(dim=-1)).abs().max())
    if not off <= 1e-3:
        raise SystemExit(f"wrong log-sum-exps: off by {off:.2e}")
    return off


def attention(layer: Layer, repeats: int) -> list[Row]:
    """What the log-sum-exp costs that column sums need: torch's own choice without it, ours and flash with it."""
    q, k, v = layer.q, layer.k, layer.v
    few = max(2, repeats // 4)
    plain = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    ours = partial(kernels.attend, q, k, v, scale=SCALE, causal=True, need_lse=True)

    def flash() -> object:
        keys, values = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, True, scale=SCALE)

    floor = 2 * layer.length**2 * DIM * HEADS * GROUP / PEAK
    return [
        Row("attention, sdpa's choice", one_by_one(plain, few), floor, None, None),
        Row("attention with lse (error: of lse)", one_by_one(ours, few), floor, None, lse_error(layer, layer.lse)),
        Row("attention with lse, flash", one_by_one(flash, few), floor, None, None),
    ]


def ragged(layer: Layer, repeats: int) -> list[Row]:
    """A chunk of 1024 queries behind heads of unequal lengths: by lengths, and as the naive twin does it."""
    if layer.length > 32768:
        return []  # the twin's logits
    q = layer.q[:, :, -1024:]
    lengths = torch.linspace(layer.length // 2, layer.length, HEADS, device="cuda").int()[None]
    absent = torch.arange(layer.length, device="cuda") >= lengths[..., None]
    bias = torch.zeros(1, HEADS, layer.length, device="cuda").masked_fill(absent, -torch.inf)
    given = partial(kernels.attend, q, layer.k, layer.v, scale=SCALE, bias=bias, need_lse=True)
    ours, twin = given(lengths=lengths), given()
    assert ours.lse is not None
    assert twin.lse is not None
    off = max(float((ours.lse - twin.lse).abs().max()), error(ours.out, twin.out.double(), 2e-2))
    took = one_by_one(partial(given, lengths=lengths), repeats)
    return [Row("1024 queries, ragged heads", took, 0.0, one_by_one(given, max(2, repeats // 4)), off)]


def sweep(layer: Layer, repeats: int) -> None:
    """Other blocks, warps and stages for the column sums and the query moments, best first."""
    from kvthrift.kernels.triton import halves
    from kvthrift.kernels.triton.sums import sums

    spread = layer.positions[:, None].expand(1, HEADS, layer.length)
    given = (layer.q, layer.k, layer.lse, layer.positions, spread, layer.valid, SCALE, None)
    found = []
    for tile, warps, stages in product(((128, 64), (128, 128), (256, 64), (64, 128)), (4, 8), (2, 3)):
        try:
            took = one_by_one(partial(sums, *given, tile=tile, warps=warps, stages=stages), repeats)
        except triton.runtime.errors.OutOfResources:
            continue
        found.append((1e6 * took, tile, warps, stages))
        print(f"    {found[-1][0]:.0f} us: entries x queries {tile}, {warps} warps, {stages} stages", flush=True)
    print("    best:", min(found), flush=True)
    turns = kernels.query_turns(layer.q, layer.positions, layer.rope)
    assert turns is not None
    tried = []
    for step, warps, stages, registers in product((32, 64), (4, 8), (2, 3, 4), (96, 128, 168, 255)):
        sizes = {"step": step, "warps": warps, "stages": stages, "registers": registers}
        call = partial(halves.moments, layer.q, *turns, layer.positions >= 4, 1.0, **sizes)
        try:
            tried.append((1e6 * graphed(call, repeats), *sizes.values()))
        except triton.runtime.errors.OutOfResources:
            continue
        print(f"    {tried[-1][0]:.0f} us: query moments, {sizes}", flush=True)
    print("    best:", min(tried), flush=True)


def line(name: str, row: Row) -> str:
    """A row of the table."""
    floor = f"{1e6 * row.floor:.1f}" if row.floor else "-"
    share = f"{row.floor / row.ours:.0%}" if row.floor else "-"
    twin = "-" if row.twin is None else f"{1e6 * row.twin:.0f}"
    off = "-" if row.error is None else f"{row.error:.1e}"
    return f"| {name} | {row.name} | {1e6 * row.ours:.1f} | {floor} | {share} | {twin} | {off} |"


def main(
    lengths: str = ",".join(LENGTHS),
    repeats: int = 12,
    sweeping: Annotated[bool, typer.Option("--sweep", help="try other blocks for sums and moments at 32K")] = False,
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(10)
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, triton {triton.__version__}, Python "
        f"{platform.python_version()}. A copy moves {bandwidth / 1e12:.2f} TB/s (read and written).",
        "",
        "| prompt | what | us a layer | floor us | of floor | twin us | error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for name in lengths.split(","):
        layer = layer_of(LENGTHS[name])
        parts: list[Callable[[], Row | list[Row]]] = [
            partial(window, layer, bandwidth, repeats),
            partial(columns, layer, repeats, twin=layer.length <= 32768),
            partial(columns, layer, repeats, twin=False, products="int8"),
            partial(moments, layer, bandwidth, repeats),
            partial(forms, layer, bandwidth, repeats),
            partial(choice, layer, bandwidth, repeats),
            partial(whole, layer, repeats),
            partial(attention, layer, repeats),
            partial(ragged, layer, repeats),
        ]
        for part in parts:
            made = part()
            for row in made if isinstance(made, list) else [made]:
                lines.append(line(name, row))
                print(lines[-1], flush=True)
            torch.cuda.empty_cache()
        if sweeping and name == "32K":
            sweep(layer, 3)
        del layer, parts, part
    publish(lines, out)


if __name__ == "__main__":
    typer.run(main)
