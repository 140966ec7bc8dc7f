"""From bytes to numbers in registers, which cost least where bits stay where they lie in a byte.

Levels count from 0. Packed, a level's bits are the last ones of a float16 whose exponent is 0: a number below the
normal ones, ``level * step * 2 ** -24`` exactly, where a plane's step is a power of two. Products of tensor cores take
such numbers as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = 24  # a float16 whose only bit is the last is 2 to the minus this


@triton.constexpr_function
def rise(floating: bool, packed: bool) -> float:
    """What numbers are multiplied with in the end, so that levels are a plane's step apart."""
    return 2.0**_LEAST if packed and not floating else 1.0


@triton.constexpr_function
def step(bits: int, plane: int, packed: bool) -> float:
    """How far two levels are apart."""
    return 2.0 ** (bits * plane) if packed else 1.0


@triton.constexpr_function
def centre(bits: int, plane: int, packed: bool) -> float:
    """What the middle between the first level and the last reads as."""
    first = 0.0 if packed else -(2.0 ** (bits - 1))
    return first + float(step(bits, plane, packed)) * (2.0**bits - 1) / 2


@triton.constexpr_function
def _asm(bits: int, floating: bool, plane: int) -> str:
    """Four bytes in a register to two registers of two float16 each."""
    if floating:
        halves = "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;"
        return "{ .reg .b16 a, b; mov.b32 {a, b}, $2; " + halves + " }"
    if bits == 8:  # signed: the highest bit is the other way round
        other = "xor.b32 a, $2, 0x80808080;"
        return "{ .reg .b32 a; " + other + " prmt.b32 $0, a, 0, 0x4140; prmt.b32 $1, a, 0, 0x4342; }"
    mask = (2**bits - 1) << (bits * plane)
    lines = [".reg .b32 a, b;", "prmt.b32 a, $2, 0, 0x4140;", "prmt.b32 b, $2, 0, 0x4342;"]
    lines += [f"and.b32 ${i}, {name}, 0x{mask:04X}{mask:04X};" for i, name in enumerate("ab")]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def numbers(
    codes, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The numbers in plane ``PLANE`` of bytes; packed ones are float16, made two at a time."""
    if PACKED:
        asm: tl.constexpr = _asm(BITS, FLOATING, PLANE)
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    elif FLOATING:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif BITS == 8:
        return codes.to(tl.int8, bitcast=True).to(dtype)
    else:
        return ((codes >> (BITS * PLANE)) & (2**BITS - 1)).to(dtype) - 2 ** (BITS - 1)
