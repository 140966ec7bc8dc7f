"""From bytes to numbers in registers: integers around their middle, or above a power of two that is taken off later."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_MASKS = {4: "0x000F000F", 2: "0x00030003"}
_LIFTED = {"bf16": ("0x43004300", 128), "fp16": ("0x64006400", 1024)}  # as 16 bits: that number, plus the lowest bits
_FLOATS = {"bf16": ("bf16", 4, "0x07F007F0", "0x7B807B80"), "fp16": ("f16", 1, "0x3F803F80", "0x5C005C00")}


@triton.constexpr_function
def lifted(bits: int, dtype: Any) -> float:
    """What packed :func:`numbers` leave to add to an integer, so that the middle is at 0."""
    return float(-_LIFTED[_name(dtype)][1] - (2**bits - 1) / 2)


@triton.constexpr_function
def _name(dtype: Any) -> str:
    return "bf16" if dtype == tl.bfloat16 else "fp16"


@triton.constexpr_function
def _integer_asm(bits: int, plane: int, dtype: Any) -> str:
    """Four bytes in a register to two registers of two numbers: bits are put under those of a power of two."""
    kind = _name(dtype)
    lines = [".reg .b32 a, b;", "prmt.b32 a, $2, 0, 0x4140;", "prmt.b32 b, $2, 0, 0x4342;"]
    for out, name in ((0, "a"), (1, "b")):
        if plane:
            lines.append(f"shr.b32 {name}, {name}, {bits * plane};")
        lines.append(f"lop3.b32 ${out}, {name}, {_MASKS[bits]}, {_LIFTED[kind][0]}, 0xEA;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _float_asm(dtype: Any) -> str:
    """Four e4m3 in a register to two registers of two numbers: exponent and mantissa are moved, then the bias is."""
    kind, down, moved, bias = _FLOATS[_name(dtype)]
    lines = [".reg .b32 a, b, c, m, z;", f"mov.b32 m, {bias};", "mov.b32 z, 0x80008000;"]
    for out, bytes_ in ((0, "0x1404"), (1, "0x3424")):  # each into the upper half of 16 bits
        lines += [f"prmt.b32 a, $2, 0, {bytes_};", f"shr.b32 b, a, {down};", f"and.b32 b, b, {moved};"]
        lines += ["lop3.b32 c, a, 0x80008000, b, 0xEA;", f"fma.rn.{kind}x2 ${out}, c, m, z;"]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _asm(bits: int, floating: bool, plane: int, dtype: Any) -> str:
    return str(_float_asm(dtype) if floating else _integer_asm(bits, plane, dtype))


@triton.jit
def numbers(
    codes, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The numbers in plane ``PLANE`` of bytes. Integers are half below their level, or far above it where packed.

    Packed instructions work on two numbers of 16 bits at a time; :func:`lifted` says what they leave to add.
    """
    if PACKED and (FLOATING or BITS < 8):
        asm: tl.constexpr = _asm(BITS, FLOATING, PLANE, dtype)
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    elif FLOATING:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif BITS == 8:
        return codes.to(tl.int8, bitcast=True).to(dtype)
    else:
        return ((codes >> (BITS * PLANE)) & (2**BITS - 1)).to(dtype) - 2 ** (BITS - 1)
