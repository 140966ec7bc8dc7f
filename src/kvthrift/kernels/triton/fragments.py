"""Pages of 4 bits in the order in which a warp's tensor-core products take them; Gluon, for one warp.

A product of 16 x 8 x 16 numbers has its operands spread over the 32 threads in a fixed way, which is neither the order
of a page nor the order in which the product before leaves its result. Here nothing goes through shared memory to be put
right: which channel or token is which index of a sum is free, as long as both sides agree, and thus chosen so that a
thread's 16 bytes of a page are its own part of a product. Every ``assert_trivial`` says that no number moves.

A unit of 16 bits holds a level of each of four runs ("planes") of 32 channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

_MMA = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
_THREADS = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
MMA = gl.constexpr(_MMA)
LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA, 8))  # eight numbers of a row together
RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA, 8))
LEFT2 = gl.constexpr(gl.DotOperandLayout(0, _MMA, 2))
RIGHT2 = gl.constexpr(gl.DotOperandLayout(1, _MMA, 2))
# [64, 32] units of keys as LEFT has them, were a plane's 32 channels followed by another's
UNITS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [16, 0], [32, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [64, 32]
    )
)
# [8, 8, 8] products of entries with queries: what a thread has, an entry of 8, a query
PRODUCTS = gl.constexpr(
    gl.DistributedLinearLayout([[0, 0, 1], [1, 0, 0], [2, 0, 0], [4, 0, 0]], _THREADS, [], [], [8, 8, 8])
)
EACH = gl.constexpr(gl.SliceLayout(0, PRODUCTS.value))  # [8, 8] what each thread has of the queries it works on
# [64] numbers of tokens as their products lie
TOKENS = gl.constexpr(gl.DistributedLinearLayout([[2], [4], [32]], [[0], [0], [1], [8], [16]], [], [], [64]))
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# [32, 64] units of values: every other row with its halves exchanged, so that no two threads meet at a bank
HALVES = gl.constexpr(
    gl.SharedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 32], [2, 0], [4, 0], [8, 0], [16, 0]])
)
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # of before Triton 3.7, and after
_fetch = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# Two units' levels of the first plane; of the first and 16 times the second; of the third; and so on. As float16 below
# the normal ones, level times 2 ** -24, which products take as they are.
_LEVELS = gl.constexpr(
    "and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00FF00FF; prmt.b32 $3, $4, 0, 0x4341; and.b32 $2, $3, 0x000F000F;"
)
_TURN = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")
MIXED = gl.constexpr(16.0)  # of the second plane in what is read for it, and of the fourth


@gluon.jit
def send(k_slot, v_slot, k_marks_slot, v_marks_slot, k_ptr, v_ptr, k_marks_ptr, v_marks_ptr, page):
    """Have a page copied; tokens of keys in the order in which their products are wanted."""
    KEYS: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    MARKS: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    m = gl.arange(0, 64, gl.SliceLayout(1, KEYS))
    c = gl.arange(0, 32, gl.SliceLayout(0, KEYS))
    token = (m >> 5) * 32 + ((m >> 1) & 3) * 8 + ((m >> 3) & 3) * 2 + (m & 1)
    _fetch(k_slot, k_ptr + page * 2048 + (token[:, None] * 32 + c[None, :]))
    _fetch(k_marks_slot, k_marks_ptr + page * 256 + gl.arange(0, 256, MARKS))
    c = gl.arange(0, 32, gl.SliceLayout(1, VALUES))
    n = gl.arange(0, 64, gl.SliceLayout(0, VALUES))
    _fetch(v_slot, v_ptr + page * 2048 + (c[:, None] * 64 + n[None, :]))
    _fetch(v_marks_slot, v_marks_ptr + page * 128 + gl.arange(0, 128, MARKS))


@gluon.jit
def levels(units):
    """Units to what is read for each of their planes."""
    return gl.inline_asm_elementwise(
        _LEVELS, "=r,=r,=r,=r,r", [units], (gl.float16, gl.float16, gl.float16, gl.float16), True, 2
    )


@gluon.jit
def key_levels(units):
    """Left operand ``[64, 128]`` of units ``[64, 32]``, a plane after the other."""
    first, second, third, fourth = levels(units)
    planes = gl.permute(gl.join(gl.join(first, third), gl.join(second, fourth)), (0, 2, 3, 1))
    return gl.convert_layout(gl.reshape(planes, [64, 128]), LEFT, assert_trivial=True)


@gluon.jit
def unmixed(x):
    """Right operand ``[128, 8]``: what a first or third plane is multiplied with, less what the next one is."""
    planes = gl.permute(gl.reshape(x, [2, 2, 32, 8]), (0, 2, 3, 1))
    even, odd = gl.split(planes)
    planes = gl.permute(gl.join(even - odd, odd), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(planes, [128, 8]), RIGHT, assert_trivial=True)


@gluon.jit
def by_entry(products):
    """``[64, 8]`` products as ``[8, 8, 8]``."""
    return gl.convert_layout(gl.reshape(products, [8, 8, 8]), PRODUCTS, assert_trivial=True)


@gluon.jit
def by_token(x):
    """``[64]`` numbers of tokens as ``[8, 8]`` beside their products."""
    x = gl.permute(gl.reshape(x, [2, 4, 4, 2]), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(x, [8, 8]), gl.SliceLayout(2, PRODUCTS), assert_trivial=True)


@gluon.jit
def turned(weights):
    """``[8, 8, 8]`` weights as the right operand ``[64, 8]`` of values, tokens in their own order."""
    found = gl.inline_asm_elementwise(_TURN, "=r,r", [weights.to(gl.float16)], gl.float16, True, 2)
    found = gl.permute(gl.reshape(found, [2, 4, 8, 4, 2]), (0, 3, 1, 4, 2))
    return gl.convert_layout(gl.reshape(found, [64, 8]), RIGHT, assert_trivial=True)


@gluon.jit
def each(x):
    """``[8, 8]`` numbers of entries and queries as what each thread has."""
    return gl.convert_layout(x, EACH, assert_trivial=True)


@gluon.jit
def columns(x):
    """``[8]`` numbers of queries beside an output ``[.., 8]``."""
    return gl.convert_layout(x, gl.SliceLayout(0, MMA), assert_trivial=True)


@gluon.jit
def everywhere(x):
    """``[8]`` numbers of queries as ``[8, 8]`` what each thread has."""
    return gl.zeros([8, 8], gl.float32, EACH) + gl.convert_layout(x, gl.SliceLayout(0, EACH))[None, :]
