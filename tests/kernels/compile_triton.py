"""Compile every Triton kernel for a GPU that need not be there; run as a script, without the interpreter.

The interpreter accepts programs that the compiler does not.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvthrift.kernels.triton.append import _append
from kvthrift.kernels.triton.read import _read

TARGET = GPUTarget("cuda", 90, 32)


def compile_kernel(kernel: object, types: dict[str, str], constants: dict[str, object]) -> None:
    source = ASTSource(fn=kernel, signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    triton.compile(source, target=TARGET, options={"num_warps": 4})


def main() -> None:
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
