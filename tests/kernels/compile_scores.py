"""Compile the kernels that score for a GPU that need not be there, as ``compile_triton.py`` does the others.

What they take of a multiprocessor's memory must be there on every GPU from compute capability 8.0 on.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvthrift.kernels.naive_int8 import KEY_BLOCK
from kvthrift.kernels.triton.best import _best
from kvthrift.kernels.triton.best_long import _count, _kept
from kvthrift.kernels.triton.forms import _forms
from kvthrift.kernels.triton.halves import _added, _runs
from kvthrift.kernels.triton.moments import _moments
from kvthrift.kernels.triton.norms import _joined, _norms
from kvthrift.kernels.triton.quantize import _coarse_keys, _coarse_queries, _row_sums
from kvthrift.kernels.triton.sums import _sums
from kvthrift.kernels.triton.sums_int8 import _sums_int8
from kvthrift.kernels.triton.tiles import PRECISION, padded, tiles

TARGET = GPUTarget("cuda", 90, 32)
LEAST_MEMORY = 99 * 1024  # bytes of shared memory that a program may have where there is least
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WHOLE = {"q_position": "i64", "k_position": "i64", "count": "i64"}
HALF = dict.fromkeys(("high", "low", "limit"), "i32")
TRUE = dict.fromkeys(("valid", "use", "keep"), "i1")
FLOATS = ("norm", "part", "out", "lse", "cos", "sin", "total", "outer", "mean", "size", "score", "bias", "sum")
MORE = ("factor", "step", "shift", "middle")
POINTERS = {
    **WHOLE,
    **HALF,
    **TRUE,
    **dict.fromkeys((*FLOATS, *MORE), "fp32"),
}  # of others: the dtype of queries and keys


def compile_kernel(
    kernel: Any, dtype: str, constants: dict[str, object], warps: int, stages: int = 2, **more: Any
) -> None:
    """With pointers and strides on multiples of 16, as they are in practice: only then are loads as wide as there."""
    types, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            continue
        stem = name.removesuffix("_ptr")
        if stem != name:
            types[name] = f"*{POINTERS.get(stem, dtype)}"
            aligned[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name in ("scale", "stretch") else "i32"
            if name.endswith(("_b", "_h", "_t")):
                aligned[place,] = [["tt.divisibility", 16]]
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages, **more})
    assert done.metadata.shared <= LEAST_MEMORY, f"{kernel} {dtype} {constants}: {done.metadata.shared} bytes"


def compile_int8(dtype: str, dim: int, group: int, bias: bool) -> None:
    """Sums by products in 8 bits, and what rounds queries and keys for them."""
    wide = max(32, padded(dim))
    heads = {"HEADS": 8, "GROUP": group, "DP": wide}
    rest = {"D": dim, "N": 32, "RUN": min(wide, 64)}
    compile_kernel(_row_sums, dtype, {"HEADS": 8, "D": dim, "DP": wide, "N": 64 if wide <= 128 else 32, "STEPS": 16}, 8)
    POINTERS.update(out="i8")
    compile_kernel(_coarse_keys, dtype, {**heads, **rest, "SHARE": KEY_BLOCK}, 4)
    compile_kernel(_coarse_queries, dtype, {**heads, **rest, "BLOCKS": 16}, 4)
    POINTERS.update(out="fp32")
    for few in ({}, {"blocks": 1, "entries": 1}):
        sizes = {"N": 128, "W": 64, "SHARE": KEY_BLOCK, "CHUNK": 1024, "HAS_BIAS": bias, "STAGES": 3}
        compile_kernel(_sums_int8, "i8", {**heads, **sizes, **few}, 4, 3, maxnreg=128)


def main() -> None:
    cases = (("bf16", 128, 4, False), ("fp16", 80, 3, True), ("fp16", 256, 1, False), ("fp32", 256, 2, True))
    for dtype, dim, group, bias in cases:
        tall, across, stages = tiles(dim, DTYPES[dtype])
        heads = {"HEADS": 8, "GROUP": group, "D": dim, "DP": padded(dim)}
        common = {**heads, "HAS_BIAS": bias, "PRECISION": PRECISION, "STAGES": stages}
        warps = 8 if tall >= 128 else 4
        compile_kernel(_joined, dtype, {"P": 64, "N": 128}, 4)
        compile_kernel(_norms, dtype, {**common, "M": tall, "N": across}, warps, stages)
        sizes = {"EACH": 1, "POWER": 1, "N": tall, "W": across, "BOUNDS": True, "CHUNK": 1024}
        compile_kernel(_sums, dtype, {**common, **sizes}, warps, stages)
        window = {**sizes, "EACH": group, "POWER": 2, "W": min(across, 32), "BOUNDS": False, "blocks": 1}
        compile_kernel(_sums, dtype, {**common, **window}, warps, stages)
        compile_int8(dtype, dim, group, bias)
        half, halves, wide = dim // 2, dtype != "fp32", min(padded(dim), 128)
        turn = {"HEADS": 8 * group, "D": dim, "HALF": half, "ANGLES": half, "RUN": gcd(half, 16), "P": wide}
        ahead = 2 if dim <= 128 else 1
        rest = {"N": 32 if halves else 16, "PRECISION": PRECISION, "STAGES": ahead}
        compile_kernel(_moments, dtype, {**turn, **rest}, 8 if wide == 128 else 4, ahead)
        if halves and half <= 64:
            pair = {"HALF": half, "P": padded(half)}
            POINTERS.update(cos="fp16", sin="fp16")
            compile_kernel(_runs, dtype, {"HEADS": 8 * group, **pair, "N": 64, "STAGES": 3}, 8, 3, maxnreg=128)
            POINTERS.update(cos="fp32", sin="fp32")
            compile_kernel(_added, "fp32", {**pair, "ROWS": 16}, 4)
        part = min(padded(dim), (128 if dim <= 128 else 64) if halves else 32)
        step = 64 if halves and dim <= 128 else 32 if halves else 16
        form = {**heads, "P": part, "N": step, "SPREAD": True, "HALVES": halves, "PRECISION": PRECISION, "STAGES": 2}
        compile_kernel(_forms, dtype, form, 4)
    compile_kernel(_best, "fp32", {"N": 16384}, 16)
    POINTERS.update(hist="i32", part="i32")
    for piece in (2048, 8192):
        for turn in (0, 3):
            compile_kernel(_count, "fp32", {"ROUND": turn, "N": piece}, piece // 512)
        compile_kernel(_kept, "fp32", {"P": 128, "N": piece}, piece // 512)
    print("compiled")


if __name__ == "__main__":
    main()
