"""One number at a time: integers between a group's extremes, or small floats.

A group of keys is one channel of a page, a group of values one token's channels (up to 128 of them). The newest page
of every head is left as the model gave it, and written when it is full and the next entry comes (KIVI, 2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvthrift.kernels.codes import Format
from kvthrift.part import Part


@dataclass(frozen=True)
class Codec(Part, kind="codec"):
    """How the keys and values that stay are written: ``format``."""

    format: ClassVar[Format]


@dataclass(frozen=True)
class Integer8(Codec, name="int8"):
    """256 even levels between the least and the largest number of a group."""

    format: ClassVar[Format] = Format("int8", 8)


@dataclass(frozen=True)
class Integer4(Codec, name="int4"):
    """16 even levels between the least and the largest number of a group."""

    format: ClassVar[Format] = Format("int4", 4)


@dataclass(frozen=True)
class Integer2(Codec, name="int2"):
    """4 even levels between the least and the largest number of a group."""

    format: ClassVar[Format] = Format("int2", 2)


@dataclass(frozen=True)
class Float8(Codec, name="fp8"):
    """Floats of 8 bits (e4m3), scaled so that a group's largest number is 448."""

    format: ClassVar[Format] = Format("fp8", 8, floating=True)
