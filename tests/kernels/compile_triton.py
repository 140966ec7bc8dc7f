"""Compile every Triton kernel for a GPU that need not be there; run as a script, without the interpreter.

The interpreter accepts programs that the compiler does not.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvthrift.kernels.triton import append_coded, read_coded
from kvthrift.kernels.triton.append import _append
from kvthrift.kernels.triton.read import _read

TARGET = GPUTarget("cuda", 90, 32)


def compile_kernel(kernel: object, types: dict[str, str], constants: dict[str, object], warps: int = 4) -> None:
    source = ASTSource(fn=kernel, signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    triton.compile(source, target=TARGET, options={"num_warps": warps})


def compile_coded(bits: int, floating: bool, dtype: str, dim: int, bias: bool) -> None:
    planes = 8 // bits
    wide = triton.next_power_of_2(dim // planes)
    model = {f"{name}_ptr": f"*{dtype}" for name in ("q", "tail_k", "tail_v", "out")}
    codes = {"k_ptr": "*u8", "v_ptr": "*u8"}
    marks = {f"{name}_ptr": "*fp16" for name in ("k_scale", "k_middle", "v_scale", "v_middle")}
    table = {"table_ptr": "*i32", "length_ptr": "*i32"}
    parts = {"lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32", "arrived_ptr": "*i32"}
    types = {**model, **codes, **marks, **table, **parts, "bias_ptr": "*fp32" if bias else "*fp16"}
    order = read_coded._read.arg_names
    types |= {"scale": "fp32", "width": "i32", "rows": "i32"}
    sizes = {"ROWS": 64, "QUERIES": 4, "M": 8, "D": dim, "DP": max(16, wide), "DV": dim, "DVP": max(16, wide), "QP": 4}
    rest = {"PARTS": 8, "PAGE": 64, "BITS": bits, "FLOATING": floating, "PACKED": True, "EVEN": not bias,
            "HAS_BIAS": bias, "PRECISION": "tf32", "STAGES": 5}  # fmt: skip
    compile_kernel(read_coded._read, {name: types[name] for name in order if name in types}, {**sizes, **rest}, warps=1)
    fresh = {"new_k_ptr": f"*{dtype}", "new_v_ptr": f"*{dtype}", "new_position_ptr": "*i64", "k_ptr": f"*{dtype}",
             "v_ptr": f"*{dtype}", "position_ptr": "*i32", "codes_k_ptr": "*u8", "codes_v_ptr": "*u8"}  # fmt: skip
    strides = {**table, **dict.fromkeys(("k_stride", "v_stride", "position_stride", "width"), "i32")}
    dims = {"HEADS": 8, "D": dim, "DP": wide, "DV": dim, "DVP": wide, "PAGE": 64, "BITS": bits, "FLOATING": floating}
    compile_kernel(append_coded._append, {**fresh, **marks, **strides}, dims)


def main() -> None:
    for bits, floating, dtype, dim, bias in (
        (4, False, "bf16", 128, False), (8, True, "bf16", 128, False), (8, False, "fp16", 80, True),
        (2, False, "fp16", 64, True), (8, True, "fp16", 96, True),
    ):  # fmt: skip
        compile_coded(bits, floating, dtype, dim, bias)
    for dtype, group, dim, bias in (("bf16", 4, 128, False), ("fp16", 3, 64, True), ("fp32", 1, 80, True)):
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v")}
        pointers |= {"bias_ptr": "*fp32" if bias else f"*{dtype}", "table_ptr": "*i32", "length_ptr": "*i32"}
        pointers |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32"}
        wide, grouped = triton.next_power_of_2(dim), triton.next_power_of_2(group)
        sizes = {"QUERIES": group, "M": 16, "D": dim, "DP": wide, "DV": dim, "DVP": wide, "QP": grouped, "PARTS": 8}
        rest = {
            "ROWS": 64,
            "PAGE": 64,
            "EVEN": group == 4,
            "ROWWISE": group == 4,
            "HAS_BIAS": bias,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "STAGES": 3,
        }
        scalars = {"scale": "fp32", "width": "i32", "rows": "i32"}
        compile_kernel(_read, {**pointers, "arrived_ptr": "*i32", **scalars}, {**sizes, **rest})
        fresh = {"new_k_ptr": f"*{dtype}", "new_v_ptr": f"*{dtype}", "new_position_ptr": "*i64"}
        held = {"k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}", "position_ptr": "*i32", "table_ptr": "*i32"}
        strides = {"length_ptr": "*i32", **dict.fromkeys(("k_stride", "v_stride", "position_stride", "width"), "i32")}
        dims = {"HEADS": 8, "D": dim, "DP": wide, "DV": dim, "DVP": wide, "PAGE": 64}
        compile_kernel(_append, {**fresh, **held, **strides}, dims)
    print("compiled")


if __name__ == "__main__":
    main()
