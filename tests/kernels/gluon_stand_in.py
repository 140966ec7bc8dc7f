"""Runs a Gluon kernel's own statements on torch tensors, program by program: there is no interpreter of Gluon.

Copies arrive no sooner than they are waited for, and what they are written over is gone at once: a kernel that waits
for too little gives NaN. A load out of bounds is an error. Layouts are not looked at: where they do not fit, the
compiler says so, which ``compile_triton.py`` asks without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


class Numbers(Tensor):
    """Numbers of a program."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:  # type: ignore[override]
        return self.view(dtype) if bitcast else Tensor.to(self, dtype)

    def __iadd__(self, other: Any) -> Numbers:  # type: ignore[override,misc]
        return self + other  # type: ignore[no-any-return]


def numbers(x: Any) -> Numbers:
    return torch.as_tensor(x).as_subclass(Numbers)  # type: ignore[no-any-return]


class Element:
    """What a pointer's type says."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.element_ty = dtype


class Pointer:
    """Numbers in memory, and which of them are pointed at."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at, self.dtype = memory, torch.as_tensor(at), Element(memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        """The first number of ``x``, with all of its storage behind it."""
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return cls(whole, x.storage_offset())

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.at + step)

    def _inside(self, mask: Any) -> Tensor:
        inside = torch.as_tensor(True if mask is None else mask).expand_as(self.at)
        assert ((self.at >= 0) & (self.at < len(self.memory)))[inside].all(), "out of bounds"
        return inside

    def read(self, mask: Any = None, other: Any = 0) -> Numbers:
        inside = self._inside(mask)
        found = self.memory[self.at.where(inside, torch.zeros_like(self.at))]
        return numbers(found.where(inside, torch.as_tensor(other, dtype=found.dtype)))

    def write(self, value: Any, mask: Any = None) -> None:
        inside = self._inside(mask)
        value = torch.as_tensor(value).expand_as(self.at)
        self.memory[self.at[inside]] = value[inside].to(self.memory.dtype)


class Shared:
    """A part of shared memory; poisoned until something arrives."""

    def __init__(self, of: Tensor) -> None:
        self.of = of

    def poison(self) -> None:
        self.of.fill_(float("nan") if self.of.is_floating_point() else -1)

    def index(self, i: Any) -> Shared:
        return Shared(self.of[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.of[start : start + length])

    def load(self, _: object) -> Numbers:
        return numbers(self.of.clone())


class Language:
    """What one program says."""

    int16, int32, int64, float16, float32 = torch.int16, torch.int32, torch.int64, torch.float16, torch.float32

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.open: list[Callable[[], object]] = []
        self.groups: list[list[Callable[[], object]]] = []

    def program_id(self, _: int) -> Numbers:
        return numbers(self.program)

    def num_programs(self, _: int) -> int:
        return self.programs

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        if name not in ("exp2", "log2", "ceil", "abs", "where", "maximum", "minimum"):
            raise AttributeError(name)
        return lambda *given: numbers(getattr(torch, name)(*map(torch.as_tensor, given)))

    def max(self, x: Tensor, axis: int) -> Numbers:
        return numbers(x.amax(axis))

    def sum(self, x: Tensor, axis: int) -> Numbers:
        return numbers(x.sum(axis))

    def arange(self, start: int, end: int, _: object) -> Numbers:
        return numbers(torch.arange(start, end))

    def zeros(self, shape: list[int], dtype: torch.dtype, _: object) -> Numbers:
        return numbers(torch.zeros(shape, dtype=dtype))

    def full(self, shape: list[int], value: float, dtype: torch.dtype, _: object) -> Numbers:
        return numbers(torch.full(shape, value, dtype=dtype))

    def reshape(self, x: Tensor, shape: list[int]) -> Tensor:
        return x.reshape(shape)

    def permute(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        return x.permute(order)

    def broadcast(self, x: Tensor, y: Tensor) -> tuple[Numbers, Numbers]:
        both = torch.broadcast_tensors(x, y)
        return numbers(both[0]), numbers(both[1])

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x, y], -1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 0], x[..., 1]

    def associative_scan(self, x: Tensor, axis: int, _: object) -> Tensor:
        return x.cumsum(axis)

    def convert_layout(self, x: Tensor, _: object, *, assert_trivial: bool = False) -> Tensor:
        return x

    def static_range(self, n: int) -> range:
        return range(n)

    def barrier(self) -> None:
        """Threads are not told apart."""

    def load(self, at: Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Numbers:
        return at.read(mask, other)

    def store(self, at: Pointer, value: Any, mask: Any = None) -> None:
        at.write(value, mask)

    def atomic_add(self, at: Pointer, value: int, sem: str) -> int:
        old = int(at.read())
        at.write(old + value)
        return old

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], _: object) -> Shared:
        found = Shared(torch.empty(shape, dtype=dtype))
        found.poison()
        return found

    def inline_asm_elementwise(self, asm: str, _constraints: str, given: list[Tensor], *_: object) -> Any:
        if asm.startswith("movmatrix"):  # blocks of 8 x 8
            return numbers(given[0].transpose(1, 2).contiguous())
        if "laneid" in asm:
            return 7
        units = given[0].int() & 0xFFFF
        read = (units & 15, units & 255, units >> 8 & 15, units >> 8)
        return tuple(numbers(x.to(torch.int16).view(torch.float16)) for x in read)

    def fetch(self, into: Shared, at: Pointer) -> None:
        values = at.read()
        into.poison()
        self.open.append(lambda: into.of.copy_(values))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        while len(self.groups) > left:
            for arrive in self.groups.pop(0):
                arrive()

    def mma_v2(self, a: Tensor, b: Tensor, acc: Tensor) -> Numbers:
        assert a.dtype == b.dtype
        return numbers(a.float() @ b.float() + acc)


def launch(module: Any, kernel: str, programs: int, *given: Any, **rest: Any) -> None:
    """As ``module.kernel[programs](*given, **rest)``."""
    given = tuple(Pointer.to(x) if isinstance(x, Tensor) else x for x in given)
    for program in range(programs):
        said = Language(program, programs)
        spoken: dict[str, Any] = {}
        for value in vars(module).values():
            spoken |= getattr(value, "fn", launch).__globals__  # what functions of other modules know
        spoken |= vars(module)
        for name, value in list(spoken.items()):
            if hasattr(value, "fn"):
                spoken[name] = FunctionType(value.fn.__code__, spoken, name, value.fn.__defaults__)
            elif type(value).__name__ == "constexpr":
                spoken[name] = value.value
        spoken |= {"gl": said, "async_copy": said, "_fetch": said.fetch, "barrier": said.barrier, "mma_v2": said.mma_v2}
        spoken[kernel](*given, **rest)
