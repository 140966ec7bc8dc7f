"""Decode attention of one layer over pages: time, and share of what a copy moves, beside dense attention.

    python benchmarks/gpu/decode_kernel.py --out results.md
    python benchmarks/gpu/decode_kernel.py --shapes "" --formats int8,int4,int2,fp8     only pages in few bits
    python benchmarks/gpu/decode_kernel.py --shapes "" --formats "" --small             settings for short caches

Every number is of a CUDA graph that reads many layers' caches in turn, together larger than the L2 cache, so that no
layer is found there from the round before; the time is a layer's, median of the repeats. What is printed was checked
against float64 first. Heads as in Llama-3.1-8B (32 query heads, 8 KV heads, 128 wide, bf16), pages of 64.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import triton
import typer
from publish import publish
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvthrift.codec import Codec
from kvthrift.kernels import Paged, paged_attend, plan_read
from kvthrift.kernels.codes import Coded, Format, read_keys, read_values, write_keys, write_values
from kvthrift.kernels.triton import read_coded
from kvthrift.kernels.triton.read import read
from kvthrift.part import parts

HEADS, GROUP, DIM, PAGE = 8, 4, 128, 64
SCALE = DIM**-0.5
SPACE = 300 * 2**20  # bytes that a round touches at least
_CALLS = 16  # of a graph: launching the graph itself is no part of a step of many layers
SHAPES = {"1 x 1K": (1, 1024), "1 x 4K": (1, 4096), "1 x 32K": (1, 32768), "8 x 4K": (8, 4096), "8 x 32K": (8, 32768),
          "64 x 4K": (64, 4096), "32 x 8K": (32, 8192)}  # fmt: skip
Setting = tuple[int, int, int]  # programs, warps, stages; zeros are what the library takes


def per_call(call: Callable[[int], object], layers: int, repeats: int) -> float:
    """Microseconds of ``call(layer)`` within a graph of at least as many calls as a small model has layers."""
    order = [layer for _ in range(max(1, -(-_CALLS // layers))) for layer in range(layers)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for layer in range(layers):
            call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in order:
            call(layer)
    times = []
    for turn in range(repeats + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if turn >= 5:
            times.append(1000 * start.elapsed_time(stop) / len(order))
    graph.reset()
    return median(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of a copy of two gibibytes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2 * source.numel() * 2 / median(times)


def machine(peak: float) -> str:
    """What was measured on, and a copy's bytes a second there."""
    return (
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, triton {triton.__version__}, Python "
        f"{platform.python_version()}. A copy moves {peak / 1e12:.2f} TB/s (read and written)."
    )


def layer_of(lengths: Tensor, page: int = PAGE) -> tuple[Tensor, Paged]:
    """Random queries ``[B, HG, 1, D]`` and scattered pages for ``lengths [B, H]``."""
    rows, width = lengths.numel(), int(-(-lengths.max() // page))
    counts = -(-lengths.reshape(-1) // page)
    total = int(counts.sum())
    table = torch.zeros(rows, width, dtype=torch.int32)
    table[torch.arange(width) < counts[:, None]] = torch.randperm(total).int()
    pages = [torch.empty(total, page, DIM, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2)]
    positions = torch.zeros(total, page, dtype=torch.int32, device="cuda")
    queries = torch.randn(len(lengths), HEADS * GROUP, 1, DIM, device="cuda").bfloat16()
    return queries, Paged(*pages, positions, table.cuda(), lengths.reshape(-1).int().cuda())


def check(q: Tensor, paged: Paged, out: Tensor) -> None:
    """Against float64, on a few rows."""
    rows = paged.table.shape[0]
    folded, found = q.reshape(rows, GROUP, DIM).double(), out.reshape(rows, GROUP, DIM).double()
    for row in range(0, rows, max(1, rows // 4)):
        length = int(paged.lengths[row])
        index = paged.table[row, : -(-length // paged.page)].long()
        k, v = (t[index].reshape(-1, DIM)[:length].double() for t in (paged.keys, paged.values))
        wanted = (folded[row] @ k.T * SCALE).softmax(-1) @ v
        torch.testing.assert_close(found[row], wanted, atol=4e-3, rtol=2e-2)


def coded_layer_of(form: Format, lengths: Tensor, page: int = PAGE) -> tuple[Tensor, Paged]:
    """As :func:`layer_of`, with pages in few bits, and each row's last page as it is."""
    queries, dense = layer_of(lengths, page)
    total = len(dense.keys)
    keys, values = (
        torch.empty(total, rows, DIM * page // form.together // rows, dtype=form.unit, device="cuda")
        for rows in (page, DIM // form.together)
    )
    marks = [
        torch.empty(total, form.marks, *sizes, dtype=torch.float16, device="cuda") for sizes in ((DIM,), (1, page))
    ]
    coded, index = Coded(form, keys, values, *marks), torch.arange(total, device="cuda")
    assert write_keys(coded, index, dense.keys)
    assert write_values(coded, index, dense.values)
    tails = [torch.randn(lengths.numel(), page, DIM, device="cuda").bfloat16() for _ in range(2)]
    return queries, Paged(*tails, dense.positions, dense.table, dense.lengths, coded=coded)


def check_coded(q: Tensor, paged: Paged, out: Tensor) -> None:
    """Against float64 attention over what the pages read as, on a few rows."""
    coded, rows = paged.coded, paged.table.shape[0]
    assert coded is not None
    folded, found = q.reshape(rows, GROUP, DIM).double(), out.reshape(rows, GROUP, DIM).double()
    for row in range(0, rows, max(1, rows // 4)):
        length = int(paged.lengths[row])
        index = paged.table[row, : -(-length // paged.page)].long()
        k, v = read_keys(coded, index, torch.float32).double(), read_values(coded, index, torch.float32).double()
        k[-1], v[-1] = paged.keys[row].double(), paged.values[row].double()
        k, v = k.reshape(-1, DIM)[:length], v.reshape(-1, DIM)[:length]
        wanted = (folded[row] @ k.T * SCALE).softmax(-1) @ v
        # An average of many random values is small: what it is off by is told by the size of one value.
        off = float((found[row] - wanted).square().mean().sqrt() / v.square().mean().sqrt())
        assert off < 2e-3, f"row {row} of {coded.format.name} is off by {off:.2%} of a value"


def coded_us(
    form: Format, lengths: Tensor, repeats: int, settings: list[Setting], page: int = PAGE
) -> tuple[float, dict[Setting, float]]:
    """Bytes that a layer reads, and microseconds of each setting."""
    rows, pages = lengths.numel(), int((-(-lengths // page)).sum())
    size = (pages - rows) * form.page_bytes(DIM, DIM, page) + int(
        (lengths - (lengths - 1) // page * page).sum()
    ) * DIM * 4
    made = [coded_layer_of(form, lengths, page) for _ in range(max(2, min(96, -(-SPACE // size))))]
    even, found = bool((lengths == lengths[0, 0]).all()), {}
    for programs, warps, stages in settings:
        plan = plan_read(rows, pages, GROUP, DIM, torch.device("cuda"), even=even, coded=True, programs=programs)
        chosen = {"stages": stages} if stages else {}
        call = partial(read_coded.read, scale=SCALE, plan=plan, warps=warps, **chosen)
        if not (warps or stages):  # what the library takes
            call = lambda q, paged, plan=plan: (paged_attend(q, paged, scale=SCALE, plan=plan).out,)  # noqa: E731
        try:
            check_coded(*made[0], call(*made[0])[0])
            found[programs, warps, stages] = per_call(lambda i, call=call: call(*made[i]), len(made), repeats)
        except triton.runtime.errors.OutOfResources:
            continue
    return size, found


def ours(lengths: Tensor, repeats: int, settings: list[Setting]) -> dict[Setting, float]:
    """Microseconds of each setting."""
    size = int(lengths.sum()) * DIM * 4
    layers = max(2, min(96, -(-SPACE // size)))
    made = [layer_of(lengths) for _ in range(layers)]
    rows, pages = lengths.numel(), int((-(-lengths // PAGE)).sum())
    found = {}
    for programs, warps, stages in settings:
        even = bool((lengths == lengths[0, 0]).all())
        plan = plan_read(rows, pages, GROUP, DIM, torch.device("cuda"), even=even, programs=programs)
        call = partial(read, scale=SCALE, plan=plan, warps=warps, stages=stages)
        try:
            check(*made[0], call(*made[0])[0])
            found[programs, warps, stages] = per_call(lambda i, call=call: call(*made[i]), layers, repeats)
        except triton.runtime.errors.OutOfResources:
            continue
    return found


def dense(backend: SDPBackend, batch: int, length: int, repeats: int) -> float:
    """Microseconds of torch's own attention over contiguous keys of equal lengths."""
    layers = max(2, min(96, -(-SPACE // (batch * HEADS * length * DIM * 4))))
    made = [
        tuple(
            torch.empty(batch, heads, many, DIM, dtype=torch.bfloat16, device="cuda").normal_()
            for heads, many in ((HEADS * GROUP, 1), (HEADS, length), (HEADS, length))
        )
        for _ in range(layers)
    ]
    with sdpa_kernel(backend):
        return per_call(lambda i: F.scaled_dot_product_attention(*made[i], enable_gqa=True), layers, repeats)


def formats_table(names: str, shapes: str, pages: str, repeats: int, sweep: bool, peak: float) -> list[str]:
    """Pages in few bits beside bf16 at the same entries."""
    lines = ["| entries a head | format | page | MB | us | of copy | bf16 us | times | at most | ragged 20:1 us |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    settings = [(0, 0, 0), *(product((0, 528, 1056, 2112), (1, 2, 4), (3, 5, 7)) if sweep else ())]
    for shape in filter(None, shapes.split(",")):
        batch, length = SHAPES[shape]
        lengths = torch.full((batch, HEADS), length)
        plain = ours(lengths, repeats, [(0, 0, 0)])[0, 0, 0]
        for name, page in product(filter(None, names.split(",")), map(int, pages.split(","))):
            kind = parts()["codec"][name]
            assert issubclass(kind, Codec)
            size, found = coded_us(kind.format, lengths, repeats, settings, page)
            ragged = coded_us(kind.format, skewed(batch, length, 20), repeats, settings[:1], page)[1]
            torch.cuda.empty_cache()
            here = found[settings[0]]
            lines.append(
                f"| {shape} | {name} | {page} | {size / 1e6:.0f} | {here:.1f} | {size / (here * 1e-6) / peak:.0%} | "
                f"{plain:.1f} | {plain / here:.2f} | {batch * HEADS * length * DIM * 4 / size:.2f} | "
                f"{ragged[settings[0]]:.1f} |"
            )
            print(lines[-1], flush=True)
            if sweep:
                show(name, found)
    return lines


def show(kind: str, found: dict[Setting, float]) -> None:
    """The best settings, and the worst."""
    ranked = sorted(found.items(), key=lambda item: item[1])
    print("   ", kind, [(key, round(us, 1)) for key, us in ranked[:6]], "worst", ranked[-1], flush=True)


def small_sweep(repeats: int) -> None:
    """Settings for one sequence, of which no plan fits all lengths."""
    for shape in ("1 x 1K", "1 x 4K", "1 x 32K"):
        batch, length = SHAPES[shape]
        lengths = torch.full((batch, HEADS), length)
        pages = HEADS * -(-length // PAGE)
        programs = sorted({0, *(n for n in (32, 64, 128, 132, 256, 264, 512, 528, 1024) if n <= pages)})
        found = ours(lengths, repeats, [(0, 0, 0), *product(programs, (1, 2, 4), (1, 2, 3, 5))])
        show(f"{shape}, as it is {found[0, 0, 0]:.1f} us:", found)


def skewed(batch: int, length: int, skew: int) -> Tensor:
    """``[B, H]`` lengths with the mean ``length``: one head in eight holds ``skew`` times what the others do."""
    short = length * HEADS / (HEADS - 1 + skew)
    lengths = torch.full((batch, HEADS), int(short))
    lengths[:, 3] = length * HEADS - (HEADS - 1) * int(short)
    return lengths


def main(
    repeats: int = 30,
    sweep: Annotated[bool, typer.Option(help="try every setting, and print the best")] = False,
    shapes: Annotated[str, typer.Option(help="rows of bf16")] = ",".join(list(SHAPES)[:-1]),
    formats: Annotated[str, typer.Option(help="rows of pages in few bits")] = "int8,int4,int2,fp8",
    formats_at: Annotated[str, typer.Option(help="their shapes")] = "8 x 32K,32 x 8K",
    pages: Annotated[str, typer.Option(help="entries of their pages")] = f"{PAGE},{2 * PAGE}",
    small: Annotated[bool, typer.Option(help="sweep settings for one sequence, and print the best")] = False,
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    peak = copy_bandwidth(repeats)
    lines = [
        machine(peak),
        "",
        "| entries a head | MB | cuDNN us | flash us | pages us | of copy | ragged 20:1 us | ragged / even |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    settings = [(0, 0, 0), *(product((0, 132, 264, 528, 1056, 2112), (2, 4), (2, 3, 5)) if sweep else ())]
    for name in filter(None, shapes.split(",")):
        batch, length = SHAPES[name]
        size = batch * HEADS * length * DIM * 4
        stock = [dense(x, batch, length, repeats) for x in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)]
        even = ours(torch.full((batch, HEADS), length), repeats, settings)
        ragged = ours(skewed(batch, length, 20), repeats, settings)
        torch.cuda.empty_cache()
        here, there = even[settings[0]], ragged[settings[0]]
        lines.append(
            f"| {name} | {size / 1e6:.0f} | {stock[0]:.1f} | {stock[1]:.1f} | {here:.1f} | "
            f"{size / (here * 1e-6) / peak:.0%} | {there:.1f} | {there / here:.2f} |"
        )
        print(lines[-1], flush=True)
        if sweep:
            show("even", even)
            show("ragged", ragged)
    if formats:
        lines += ["", *formats_table(formats, formats_at, pages, repeats, sweep, peak)]
    if small:
        small_sweep(repeats)
    publish(lines, out)


if __name__ == "__main__":
    typer.run(main)
