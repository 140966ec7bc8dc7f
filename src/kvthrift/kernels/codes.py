"""Whole pages in few bits: how numbers are written, and the naive twin of writing and reading them.

Keys have a scale for each channel of a page, values for each token (and group of channels): keys differ most between
channels, values between tokens (KIVI, 2402.02750). The least number of a group is rounded down and its scale up, so
that no number is further from what is read than half a scale. Knows nothing of heads, tables or lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST_GROUP = 128  # channels of a value that share a scale at most
_LARGEST_FLOAT = 448.0  # of e4m3
_AT_ONCE = 256  # pages that are worked on in float32 together
_LEAST = -(2**15) + 1  # bits of the first float16 below zero


@dataclass(frozen=True)
class Format:
    """How a number is written: a level of ``2 ** bits`` from the least one up, or a float (e4m3) around zero."""

    name: str
    bits: int
    floating: bool = False

    @property
    def unit(self) -> torch.dtype:
        """What levels are packed in: two bytes for four levels of 4 bits, so that a GPU takes them as they lie."""
        return torch.int16 if self.bits == 4 else torch.uint8

    @property
    def together(self) -> int:
        """Numbers a unit."""
        return 8 * self.unit.itemsize // self.bits

    @property
    def marks(self) -> int:
        """Float16 numbers that go with a group: its scale, and its least number unless zero is in the middle."""
        return 1 if self.floating else 2

    @property
    def reach(self) -> float:
        """Scales between the least number, or zero of floats, and the last level."""
        return _LARGEST_FLOAT if self.floating else 2.0**self.bits - 1

    def page_bytes(self, key_dim: int, value_dim: int, page: int) -> int:
        """Bytes of a page of keys and values, scales and least numbers included."""
        numbers = page * (key_dim + value_dim)
        return numbers * self.bits // 8 + 2 * self.marks * (key_dim + groups(value_dim) * page)

    def unfit(self, key_dim: int, value_dim: int) -> str | None:
        """Why such pages cannot be written so; None if they can."""
        for what, count in (("key dim", key_dim), ("value dim", value_dim)):
            if count % self.together:
                return f"{self.name} packs {self.together} numbers together, which {what} {count} is no multiple of"
        return None


@dataclass(frozen=True)
class Coded:
    """Pages of keys and values in few bits.

    Attributes:
        format: how they are written.
        keys: ``[P, page, Dk / together]`` units; unit ``i`` of n holds the channels ``i, i + n, ...``, low bits first.
        values: ``[P, Dv / together, page]`` units, turned; row ``i`` of n holds the channels ``i, i + n, ...``.
        key_marks: ``[P, marks, Dk]`` float16, the channels' scales, then their least numbers; of floats scales alone.
        value_marks: ``[P, marks, groups, page]`` float16, the tokens'.
    """

    format: Format
    keys: Tensor
    values: Tensor
    key_marks: Tensor
    value_marks: Tensor


def groups(value_dim: int) -> int:
    """Scales a token: a group has at most 128 channels, and all have as many."""
    return next(n for n in range(-(-value_dim // _WIDEST_GROUP), value_dim + 1) if value_dim % n == 0)


def write_keys(coded: Coded, index: Tensor, keys: Tensor) -> Tensor:
    """Write keys ``[N, page, Dk]`` as the pages ``index [N]``.

    Returns:
        Whether all could be: a bool. Where a number is not finite or beyond float16, its channel reads as NaN.
    """
    sound = []
    for part, x in zip(torch.split(index, _AT_ONCE), torch.split(keys, _AT_ONCE), strict=True):
        levels, scale, low = _levels(x.float(), 1, coded.format)
        coded.keys.index_copy_(0, part, pack(levels, coded.format.bits))
        sound.append(_mark(part, scale.squeeze(1), low, coded.key_marks))
    return torch.stack(sound).all() if sound else torch.ones((), dtype=torch.bool, device=keys.device)


def write_values(coded: Coded, index: Tensor, values: Tensor) -> Tensor:
    """Write values ``[N, page, Dv]`` as the pages ``index [N]``; see :func:`write_keys`."""
    sound, many = [], coded.value_marks.shape[2]
    for part, x in zip(torch.split(index, _AT_ONCE), torch.split(values, _AT_ONCE), strict=True):
        turned = (
            x.float().transpose(1, 2).reshape(len(x), many, x.shape[2] // many, x.shape[1])
        )  # [N, groups, channels, page]
        levels, scale, low = _levels(turned, 2, coded.format)
        coded.values.index_copy_(0, part, pack(levels.flatten(1, 2), coded.format.bits, dim=1))
        sound.append(_mark(part, scale.squeeze(2), low, coded.value_marks))
    return torch.stack(sound).all() if sound else torch.ones((), dtype=torch.bool, device=values.device)


def read_keys(coded: Coded, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys ``[N, page, Dk]`` of the pages ``index [N]``."""
    out = torch.empty(len(index), coded.keys.shape[1], coded.key_marks.shape[2], dtype=dtype, device=index.device)
    for begin in range(0, len(index), _AT_ONCE):
        part = index[begin : begin + _AT_ONCE]
        marks = coded.key_marks[part].float()[:, :, None]
        found = _numbers(coded.keys[part], coded.format) * marks[:, 0]
        if not coded.format.floating:
            found += marks[:, 1]
        out[begin : begin + _AT_ONCE] = found
    return out


def read_values(coded: Coded, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Values ``[N, page, Dv]`` of the pages ``index [N]``."""
    many, page = coded.value_marks.shape[2:]
    channels = coded.values.shape[1] * coded.format.together
    out = torch.empty(len(index), page, channels, dtype=dtype, device=index.device)
    for begin in range(0, len(index), _AT_ONCE):
        part = index[begin : begin + _AT_ONCE]
        found = _numbers(coded.values[part], coded.format, dim=1).view(len(part), many, out.shape[2] // many, page)
        marks = coded.value_marks[part].float()[:, :, :, None]
        found *= marks[:, 0]
        if not coded.format.floating:
            found += marks[:, 1]
        out[begin : begin + _AT_ONCE] = found.flatten(1, 2).transpose(1, 2)
    return out


def pack(levels: Tensor, bits: int, dim: int = -1) -> Tensor:
    """uint8 below ``2 ** bits`` to units: along ``dim``, unit ``i`` of n holds the levels ``i, i + n, ...``."""
    form = Format("", bits)
    first, *others = levels.to(form.unit).chunk(form.together, dim)
    out = first.clone() if others else first
    for plane, more in enumerate(others, 1):
        out |= more << (bits * plane)
    return out


def unpack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """What :func:`pack` packed."""
    if bits == 8:
        return codes
    planes = range(0, 8 * codes.element_size(), bits)
    return torch.cat([((codes >> shift) & (2**bits - 1)).to(torch.uint8) for shift in planes], dim)


def _levels(x: Tensor, dim: int, form: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels as uint8, and float16 scale and least number of the groups along ``dim``, which both keep."""
    if form.floating:
        scale = _up(x.abs().amax(dim, keepdim=True), form.reach)
        units = x / torch.where(scale == 0, 1, scale.float())
        return units.to(torch.float8_e4m3fn).view(torch.uint8), scale, None
    low = _down(x.amin(dim, keepdim=True))
    scale = _up(x.amax(dim, keepdim=True) - low.float(), form.reach)
    units = (x - low.float()) / torch.where(scale == 0, 1, scale.float())
    return (units + 0.5).floor().clamp(0, form.reach).to(torch.uint8), scale, low


def _numbers(codes: Tensor, form: Format, dim: int = -1) -> Tensor:
    """Levels, or small floats, as float32."""
    return codes.view(torch.float8_e4m3fn).float() if form.floating else unpack(codes, form.bits, dim).float()


def _mark(index: Tensor, scale: Tensor, low: Tensor | None, marks: Tensor) -> Tensor:
    found = torch.stack((scale,) if low is None else (scale, low.view_as(scale)), 1)
    marks.index_copy_(0, index, torch.where(found.isfinite(), found, torch.nan))
    return found.isfinite().all()


def _up(x: Tensor, parts: float) -> Tensor:
    """The least float16 that is not below ``x / parts``, neither of which is below 0."""
    x = x / torch.full_like(x, parts)  # by a number, a GPU would multiply by its rounded inverse
    nearest = x.half()
    return torch.where(nearest.float() < x, (nearest.view(torch.int16) + 1).view(torch.float16), nearest)


def _down(x: Tensor) -> Tensor:
    """The largest float16 that is not above ``x``."""
    nearest = x.half()
    bits = nearest.view(torch.int16)
    below = torch.where(nearest > 0, bits - 1, torch.where(nearest == 0, _LEAST, bits + 1)).to(torch.int16)
    return torch.where(nearest.float() > x, below.view(torch.float16), nearest)
