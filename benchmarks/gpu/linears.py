"""Products of few rows with the matrices of an 8B shape: cuBLAS one by one, cuBLAS on joined copies, and in one launch.

    python benchmarks/gpu/linears.py --out results.md
    python benchmarks/gpu/linears.py --sweep          also tries settings at 64 rows

Every number is of a CUDA graph that goes through copies of the weights, together larger than the L2 cache, so that
nothing is found there from the call before; microseconds, median of the repeats. What is printed was checked against
float64 first. Matrices as in Llama-3.1-8B, bf16. The last table is of eight layers' products one after another, and of
the same with a small kernel before each, as elementwise work is in a model; what has its input to itself is cuBLAS's
in every line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode_kernel import copy_bandwidth, machine, per_call
from publish import publish
from torch import Tensor
from torch.nn import functional as F

from kvthrift.kernels.linears import Setting, launched

LAYERS = 8  # copies of the weights
CASES = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
TRIED = list(product((32, 64, 128, 256), (3, 5)))  # columns, stages


@dataclass(frozen=True)
class Case:
    """Copies of what some products read."""

    x: Tensor
    apart: list[list[Tensor]]
    joined: list[Tensor]

    @staticmethod
    def of(name: str, rows: int) -> Case:
        depth, sizes = CASES[name]
        make = [torch.empty(sum(sizes), depth, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        joined = [w.normal_(std=depth**-0.5) for w in make]
        apart = [[part.clone() for part in w.split(sizes)] if len(sizes) > 1 else [w] for w in joined]
        return Case(torch.randn(rows, depth, device="cuda").bfloat16(), apart, joined)

    def of_rows(self, rows: int) -> Case:
        return replace(self, x=self.x[:rows].clone())

    @property
    def bytes(self) -> int:
        """Of the weights of one call."""
        return self.joined[0].nbytes

    @property
    def several(self) -> bool:
        return len(self.apart[0]) > 1

    def stock(self, i: int) -> object:
        return [F.linear(self.x, w) for w in self.apart[i]]

    def stock_joined(self, i: int) -> object:
        return F.linear(self.x, self.joined[i])

    def ours(self, i: int, setting: Setting | None = None) -> list[Tensor]:
        return launched(self.x, self.apart[i], [None] * len(self.apart[i]), setting)

    def as_in_a_model(self, i: int) -> object:
        return self.ours(i) if self.several else self.stock(i)

    def check(self, setting: Setting | None = None) -> None:
        """Against float64."""
        found, wanted = torch.cat(self.ours(0, setting), 1), self.x.double() @ self.joined[0].double().T
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=1e-2)


def row(name: str, case: Case, repeats: int) -> str:
    """A line of the table."""
    stock = per_call(case.stock, LAYERS, repeats)
    cells = [f"{stock:.1f}", "-", "-", "-", "-"]
    if case.several:
        case.check()
        joined, us = (per_call(call, LAYERS, repeats) for call in (case.stock_joined, case.ours))
        cells[1:] = [f"{joined:.1f}", f"{us:.1f}", f"{case.bytes / us / 1e6:.2f}", f"{stock / us:.2f}"]
    return f"| {name} | {len(case.x)} | {case.bytes / 1e6:.0f} | {' | '.join(cells)} |"


def sweep(name: str, case: Case, repeats: int) -> None:
    """Print every setting's time."""
    for columns, stages in TRIED:
        setting = Setting(columns=columns, stages=stages)
        try:
            case.check(setting)
            us = per_call(lambda i, s=setting: case.ours(i, s), LAYERS, repeats)
        except Exception as error:
            print(f"    {name} {setting}: {type(error).__name__} {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"    {name} {setting}: {us:.1f} us, {case.bytes / us / 1e6:.2f} TB/s", flush=True)


def chain(cases: list[Case], repeats: int) -> list[str]:
    """A layer's microseconds within a graph of several, by each kind of product."""
    kinds: dict[str, Callable[[Case, int], object]] = {
        "cuBLAS one by one": Case.stock,
        "cuBLAS joined": Case.stock_joined,
        "one launch": Case.as_in_a_model,
    }
    lines = []
    for kind, call in kinds.items():
        cells = []
        for between in (False, True):

            def layer(i: int, call: Callable[[Case, int], object] = call, between: bool = between) -> None:
                for case in cases:
                    if between:
                        case.x.mul_(1.0)
                    call(case, i)

            cells.append(f"{per_call(layer, LAYERS, repeats):.1f}")
        lines.append(f"| {kind} | {len(cases[0].x)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(
    repeats: int = 30,
    rows: str = "64,32,16,8,2",
    tried: Annotated[bool, typer.Option("--sweep", help="try settings at 64 rows")] = False,
    out: Annotated[Path | None, typer.Option(help="append the Markdown here")] = None,
) -> None:
    """Measure this GPU."""
    torch.manual_seed(0)
    lines = [
        machine(copy_bandwidth(repeats)),
        "",
        "| products | rows | MB | cuBLAS us | joined us | one launch us | TB/s | times |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    made = {name: Case.of(name, 64) for name in CASES}
    many = [int(n) for n in rows.split(",")]
    for name, case in made.items():
        if tried and case.several:
            sweep(name, case, repeats)
    for n in many:
        for name, case in made.items():
            lines.append(row(name, case.of_rows(n), repeats))
            print(lines[-1], flush=True)
    lines += ["", "| products of a layer | rows | us | with a small kernel before each us |", "|---|---:|---:|---:|"]
    for n in many:
        lines += chain([case.of_rows(n) for case in made.values()], repeats)
    publish(lines, out)


if __name__ == "__main__":
    typer.run(main)
