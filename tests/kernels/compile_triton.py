"""Compile every Triton kernel for a GPU that need not be there; run as a script, without the interpreter.

The interpreter accepts programs that the compiler does not.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvthrift.kernels.linears import MOST_ROWS, Device, Setting, setting_of
from kvthrift.kernels.triton import append_coded, linears, read_coded, read_int4
from kvthrift.kernels.triton.append import _append
from kvthrift.kernels.triton.read import _read
from kvthrift.kernels.triton.tiles import PRECISION
from kvthrift.kernels.triton.top_pages import _page_scores

TARGET = GPUTarget("cuda", 90, 32)
POSITIONS = {"position_ptr": "*i32", "query_position_ptr": "*i32", "window": "i32", "cap": "fp32"}


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    warps: int = 4,
    multiples: tuple[str, ...] = (),
    source: Any = ASTSource,
) -> bytes:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    names = {name for name, kind in signature.items() if kind[0] == "*"} | set(multiples)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in names}
    made = source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return bytes(
        triton.compile(
            made, target=TARGET, options={"num_warps": warps, "launch_pdl": bool(constants.get("EARLY"))}
        ).asm["cubin"]
    )


def stack(binary: bytes) -> int:
    """Bytes of a thread's stack: what its registers did not hold."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", said)[0])


def sight(seen: bool, steps: int) -> dict[str, object]:
    """Constants of what queries see: all of it, or their own within a window, logits capped."""
    return {"CAUSAL": seen, "WINDOWED": seen, "CAPPED": seen, "STEPS": steps if seen else 1, "HEADS": 8 if seen else 1}


def compile_coded(bits: int, floating: bool, dtype: str, dim: int, bias: bool) -> None:
    planes, unit = (1 if bits == 8 else 4), ("*i16" if bits == 4 else "*u8")
    many = 2 if dim > 128 else 1
    deep, wide = (triton.next_power_of_2(dim // n) for n in (planes, max(planes, many)))
    model = {f"{name}_ptr": f"*{dtype}" for name in ("q", "tail_k", "tail_v", "out")}
    codes = {"k_ptr": unit, "v_ptr": unit}
    marks = {f"{name}_marks_ptr": "*fp16" for name in "kv"}
    table = {"table_ptr": "*i32", "length_ptr": "*i32"}
    parts = {"lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32", "arrived_ptr": "*i32"}
    types = {**model, **codes, **marks, **table, **parts, "bias_ptr": "*fp32" if bias else "*fp16"}
    types |= POSITIONS if bias else {}
    types |= {"scale": "fp32", "width": "i32", "rows": "i32"}
    sizes = {"ROWS": 64, "D": dim, "DP": max(16, deep), "DV": dim, "DVP": max(16, wide), "GROUPS": many}
    rest = {"PARTS": 8, "PAGE": 64, "BITS": bits, "FLOATING": floating, "PACKED": True, "EVEN": not bias,
            "HALF": tl.float16,
            "HAS_BIAS": bias, "PRECISION": "tf32", "STAGES": 5}  # fmt: skip
    for queries in (4, 32) if bits == 4 and not bias else (4,):
        asked = {"QUERIES": queries, "HERE": queries, "M": max(8, queries), "QP": queries, **sight(bias, 2)}
        compile_kernel(read_coded._read, types, {**sizes, **rest, **asked}, read_coded._warps(max(8, queries), dim))
    fresh = {"new_k_ptr": f"*{dtype}", "new_v_ptr": f"*{dtype}", "new_position_ptr": "*i64", "k_ptr": f"*{dtype}",
             "v_ptr": f"*{dtype}", "position_ptr": "*i32", "codes_k_ptr": unit, "codes_v_ptr": unit}  # fmt: skip
    strides = {**table, **dict.fromkeys(("k_stride", "v_stride", "position_stride", "width"), "i32")}
    dims = {"HEADS": 8, "D": dim, "DP": deep, "DV": dim, "DVP": wide, "PAGE": 64, "BITS": bits, "FLOATING": floating}
    dims["GROUPS"] = many
    compile_kernel(append_coded._append, {**fresh, **marks, **strides}, dims)


def compile_int4(even: bool) -> None:
    """Layouts that do not fit are errors of the compiler."""
    model = {f"{name}_ptr": "*bf16" for name in ("q", "tail_k", "tail_v", "out")}
    pages = {"k_ptr": "*i16", "v_ptr": "*i16", "k_marks_ptr": "*fp16", "v_marks_ptr": "*fp16", "table_ptr": "*i32"}
    parts = {"lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32", "arrived_ptr": "*i32"}
    types = {**model, **pages, **parts, "length_ptr": "*i32", "scale": "fp32", "width": "i32", "rows": "i32"}
    constants = {"COUNT": 64, "QUERIES": 4, "QP": 4, "PARTS": 8, "STAGES": 2, "EXTRA": 3}
    constants |= {"EVEN": even, "EARLY": True}
    binary = compile_kernel(read_int4._read, types, constants, 1, source=GluonASTSource)
    assert stack(binary) <= 64, "a page's numbers do not fit into registers"
    found = instructions(binary)
    assert all(word in found for word in ("LDGSTS.E.BYPASS.128", "LDS.128", "MOVM.16.MT88", "HMMA.16816.F32"))


def compile_page_scores(dtype: str, bounds: str, queries: int, dim: int, joined: bool) -> None:
    types = {"q_ptr": f"*{dtype}", "low_ptr": f"*{bounds}", "high_ptr": f"*{bounds}", "table_ptr": "*i32"}
    types |= {"length_ptr": "*i32", "out_ptr": "*fp32", "width": "i32"}
    sizes = {"QUERIES": queries, "M": max(16, min(32, queries)), "D": dim, "DP": triton.next_power_of_2(dim)}
    rest = {"PAGE": 64, "N": 32, "JOINED": joined, "SUMMED": joined and queries > 16, "PRECISION": PRECISION}
    compile_kernel(_page_scores, types, {**sizes, **rest})


def instructions(binary: bytes) -> str:
    """What the kernel does, in the GPU's own language."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def compile_linears(dtype: str, rows: int, depth: int, setting: Setting, biased: int) -> None:
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", *(f"{kind}{i}" for kind in "wby" for i in range(4)))}
    sizes = ("n0", "n1", "n2", "n3", "x_stride")
    types |= dict.fromkeys(("rows", "run", *sizes), "i32")
    cut = setting_of(depth, (4096, 1024, 1024), Device(132, 227 * 2**10), setting)
    constants = {"K": depth, "M": MOST_ROWS, "NB": cut.columns, "BK": cut.depth, "STAGES": cut.stages}
    constants |= {"MANY": 3 if biased else 2, "BIASED": biased, "FULL": rows == 64, "EARLY": True}
    for name in ("rows", "run"):  # Triton takes a one for a constant
        if {"rows": rows, "run": cut.run}[name] == 1:
            types, constants = {k: v for k, v in types.items() if k != name}, {**constants, name: 1}
    binary = compile_kernel(linears._linears, types, constants, cut.warps, sizes)
    assert stack(binary) == 0, "a product has more numbers than registers"
    found = [instructions(binary).index(word) for word in ("CCTL.E.PF2", "ACQBULK", "PREEXIT", "LDGSTS")]
    assert found == sorted(found), "weights are asked for, then others waited for, then let in"
    found = instructions(binary)
    assert f"HGMMA.64x{cut.columns * 4 // cut.warps}x16" in found
    assert "LDGSTS.E.BYPASS.128" in found, "loads are not 16 bytes wide"
    wide = 128 if MOST_ROWS * cut.columns >= 32 * cut.warps * 8 else 64  # numbers of two bytes
    assert f"STG.E.{wide}" in found, "stores are not as wide as they could be"


def main() -> None:
    for columns in (32, 64, 128):
        for rows, depth, biased in ((64, 4096, 0), (32, 3584, 5), (1, 1040, 2)):
            compile_linears("bf16" if rows > 1 else "fp16", rows, depth, Setting(columns=columns), biased)
    compile_linears("bf16", 64, 4096, Setting(columns=256, stages=3), 0)
    compile_linears("fp16", 64, 14336, Setting(columns=256, stages=3, warps=8, run=3), 5)
    for given in (("bf16", "bf16", 4, 128, True), ("fp16", "fp32", 64, 80, True), ("fp32", "fp32", 16, 256, False)):
        compile_page_scores(*given)
    for bits, floating, dtype, dim, bias in (
        (4, False, "bf16", 128, False), (8, True, "bf16", 128, False), (8, False, "fp16", 80, True),
        (2, False, "fp16", 64, True), (8, True, "fp16", 96, True), (8, False, "bf16", 256, False),
        (4, False, "bf16", 256, True),
    ):  # fmt: skip
        compile_coded(bits, floating, dtype, dim, bias)
    for even in (True, False):
        compile_int4(even)
    for dtype, group, dim, bias in (
        ("bf16", 4, 128, False), ("fp16", 3, 64, True), ("fp32", 1, 80, True), ("fp16", 128, 128, True),
    ):  # fmt: skip
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v")}
        pointers |= {"bias_ptr": "*fp32" if bias else f"*{dtype}", "table_ptr": "*i32", "length_ptr": "*i32"}
        pointers |= POSITIONS if bias else {}
        pointers |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32"}
        wide, grouped = triton.next_power_of_2(dim), triton.next_power_of_2(group)
        sizes = {"D": dim, "DP": wide, "DV": dim, "DVP": wide, "PARTS": 1 if group > 16 else 8}
        sizes |= {"QUERIES": group, "HERE": group, "M": max(16, grouped), "QP": grouped}
        rest = {
            "ROWS": 64,
            "PAGE": 64,
            "EVEN": group == 4,
            "ROWWISE": group == 4,
            "ALIGNED": group != 4,
            "HELPERS": 1 if wide < 32 else 8 if wide > 64 else 4,
            "POLLS": 64,
            "HAS_BIAS": bias,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "STAGES": 3,
            "EARLY": True,
            "LATE": not even,
        }
        scalars = {"scale": "fp32", "width": "i32", "rows": "i32", "runs": "i32"}
        types = {**pointers, "arrived_ptr": "*i32", "turn_ptr": "*i32", **scalars}
        constants = {**sizes, **rest, **sight(bias, group)}
        plain = dtype == "bf16"
        binary = compile_kernel(_read, types, constants, 2 if plain else 8 if group > 64 else 4)
        assert not plain or stack(binary) == 0, "a plain read has more numbers than registers"
        fresh = {"new_k_ptr": f"*{dtype}", "new_v_ptr": f"*{dtype}", "new_position_ptr": "*i64"}
        held = {"k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}", "position_ptr": "*i32", "table_ptr": "*i32"}
        strides = {"length_ptr": "*i32", **dict.fromkeys(("k_stride", "v_stride", "position_stride", "width"), "i32")}
        dims = {"HEADS": 8, "D": dim, "DP": wide, "DV": dim, "DVP": wide, "PAGE": 64, "EARLY": True}
        compile_kernel(_append, {**fresh, **held, **strides}, dims)
    print("compiled")


if __name__ == "__main__":
    main()
