"""From packed levels to numbers in registers, which cost least where bits stay where they lie.

Packed, a level's bits are the last ones of a float16 whose exponent is 0: a number below the normal ones,
``level * step * 2 ** -24`` exactly, where a plane's step is a power of two. Products of tensor cores take such numbers
as they are. Units of 16 bits lie two in a register, as two float16 do; bytes have to be moved apart first.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = 24  # a float16 whose only bit is the last is 2 to the minus this


@triton.constexpr_function
def planes_of(bits: int) -> int:
    """Levels a unit; see :class:`kvthrift.kernels.codes.Format`."""
    return 1 if bits == 8 else 4


@triton.constexpr_function
def rise(floating: bool, packed: bool) -> float:
    """What numbers are multiplied with in the end, so that levels are a plane's step apart."""
    return 2.0**_LEAST if packed and not floating else 1.0


@triton.constexpr_function
def step(bits: int, plane: int, packed: bool) -> float:
    """How far two levels are apart."""
    return 2.0 ** (bits * (plane % 2 if bits == 4 else plane)) if packed else 1.0


@triton.jit
def steps(N: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """``[N]`` the steps of planes of ``EACH`` numbers, a plane after the other."""
    plane = tl.arange(0, N) // EACH
    if PACKED and BITS < 8:
        return tl.exp2((BITS * (plane % 2 if BITS == 4 else plane)).to(tl.float32))
    else:
        return tl.full([N], 1.0, tl.float32)


@triton.constexpr_function
def _asm(bits: int, floating: bool, plane: int) -> str:
    """A register of four bytes to two registers of two float16 each; of two units of 16 bits to one."""
    if floating:
        halves = "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;"
        return "{ .reg .b16 a, b; mov.b32 {a, b}, $2; " + halves + " }"
    if bits == 8:
        return "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;"
    if bits == 4:  # a float16 has ten bits behind its exponent: two levels where they are, two from above
        mask = f"0x{0x000F000F << (bits * (plane % 2)):08X}"
        if plane < 2:
            return f"and.b32 $0, $1, {mask};"
        return "{ .reg .b32 a; shr.u32 a, $1, 8; and.b32 $0, a, " + mask + "; }"
    mask = (2**bits - 1) << (bits * plane)
    lines = [".reg .b32 a, b;", "prmt.b32 a, $2, 0, 0x4140;", "prmt.b32 b, $2, 0, 0x4342;"]
    lines += [f"and.b32 ${i}, {name}, 0x{mask:04X}{mask:04X};" for i, name in enumerate("ab")]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def numbers(
    codes, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The numbers in plane ``PLANE`` of units; packed ones are float16, made two at a time."""
    if PACKED:
        asm: tl.constexpr = _asm(BITS, FLOATING, PLANE)
        if BITS == 4:
            return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    elif FLOATING:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif BITS == 8:
        return codes.to(dtype)
    else:
        return ((codes >> (BITS * PLANE)) & (2**BITS - 1)).to(dtype)
