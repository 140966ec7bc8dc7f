"""Whole pages in few bits: how numbers are written, and the naive twin of writing and reading them.

Keys have a scale for each channel of a page, values for each token (and group of channels): keys differ most between
channels, values between tokens (KIVI, 2402.02750). A scale is rounded up, so that no number is further from what is
read than half a scale. Knows nothing of heads, tables or lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST_GROUP = 128  # channels of a value that share a scale at most
_LARGEST_FLOAT = 448.0  # of e4m3
_AT_ONCE = 256  # pages that are worked on in float32 together


@dataclass(frozen=True)
class Format:
    """How a number is written: an integer of ``bits`` around a middle, or a float (e4m3) around zero."""

    name: str
    bits: int
    floating: bool = False

    @property
    def together(self) -> int:
        """Numbers a byte."""
        return 8 // self.bits

    @property
    def marks(self) -> int:
        """Float16 numbers that go with a group: its scale, and its middle if it has one."""
        return 1 if self.floating else 2

    @property
    def reach(self) -> float:
        """Scales between the middle and the last level."""
        return _LARGEST_FLOAT if self.floating else (2**self.bits - 1) / 2

    def page_bytes(self, key_dim: int, value_dim: int, page: int) -> int:
        """Bytes of a page of keys and values, scales and middles included."""
        numbers = page * (key_dim + value_dim)
        return numbers // self.together + 2 * self.marks * (key_dim + groups(value_dim) * page)

    def unfit(self, key_dim: int, value_dim: int) -> str | None:
        """Why such pages cannot be written so; None if they can."""
        for what, count in (("key dim", key_dim), ("value dim", value_dim)):
            if count % self.together:
                return f"{self.name} packs {self.together} numbers a byte, which {what} {count} is no multiple of"
        return None


@dataclass(frozen=True)
class Coded:
    """Pages of keys and values in few bits.

    Attributes:
        format: how they are written.
        keys: ``[P, page, Dk * bits / 8]`` uint8; byte ``i`` of n holds the channels ``i, i + n, ...``, low bits first.
        values: ``[P, Dv * bits / 8, page]`` uint8, turned; row ``i`` of n holds the channels ``i, i + n, ...``.
        key_scale, key_middle: ``[P, Dk]`` float16.
        value_scale, value_middle: ``[P, groups, page]`` float16; of floats there is no middle.
    """

    format: Format
    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    key_middle: Tensor | None = None
    value_middle: Tensor | None = None


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
        levels, scale, middle = _levels(x.float(), 1, coded.format)
        coded.keys.index_copy_(0, part, pack(levels, coded.format.bits))
        sound.append(_mark(part, scale, middle, coded.key_scale, coded.key_middle, 1))
    return torch.stack(sound).all() if sound else torch.ones((), dtype=torch.bool, device=keys.device)


def write_values(coded: Coded, index: Tensor, values: Tensor) -> Tensor:
    """Write values ``[N, page, Dv]`` as the pages ``index [N]``; see :func:`write_keys`."""
    sound, many = [], coded.value_scale.shape[1]
    for part, x in zip(torch.split(index, _AT_ONCE), torch.split(values, _AT_ONCE), strict=True):
        turned = (
            x.float().transpose(1, 2).reshape(len(x), many, x.shape[2] // many, x.shape[1])
        )  # [N, groups, channels, page]
        levels, scale, middle = _levels(turned, 2, coded.format)
        coded.values.index_copy_(0, part, pack(levels.flatten(1, 2), coded.format.bits, dim=1))
        sound.append(_mark(part, scale, middle, coded.value_scale, coded.value_middle, 2))
    return torch.stack(sound).all() if sound else torch.ones((), dtype=torch.bool, device=values.device)


def read_keys(coded: Coded, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys ``[N, page, Dk]`` of the pages ``index [N]``."""
    out = torch.empty(len(index), coded.keys.shape[1], coded.key_scale.shape[1], dtype=dtype, device=index.device)
    for begin in range(0, len(index), _AT_ONCE):
        part = index[begin : begin + _AT_ONCE]
        found = _numbers(coded.keys[part], coded.format) * coded.key_scale[part].float()[:, None]
        if coded.key_middle is not None:
            found += coded.key_middle[part].float()[:, None]
        out[begin : begin + _AT_ONCE] = found
    return out


def read_values(coded: Coded, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Values ``[N, page, Dv]`` of the pages ``index [N]``."""
    many, page = coded.value_scale.shape[1:]
    channels = coded.values.shape[1] * coded.format.together
    out = torch.empty(len(index), page, channels, dtype=dtype, device=index.device)
    for begin in range(0, len(index), _AT_ONCE):
        part = index[begin : begin + _AT_ONCE]
        found = _numbers(coded.values[part], coded.format, dim=1).view(len(part), many, out.shape[2] // many, page)
        found *= coded.value_scale[part].float()[:, :, None]
        if coded.value_middle is not None:
            found += coded.value_middle[part].float()[:, :, None]
        out[begin : begin + _AT_ONCE] = found.flatten(1, 2).transpose(1, 2)
    return out


def pack(levels: Tensor, bits: int, dim: int = -1) -> Tensor:
    """uint8 below ``2 ** bits`` to bytes: along ``dim``, byte ``i`` of n holds the levels ``i, i + n, ...``."""
    first, *others = levels.chunk(8 // bits, dim)
    out = first.clone() if others else first
    for plane, more in enumerate(others, 1):
        out |= more << (bits * plane)
    return out


def unpack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """What :func:`pack` packed."""
    if bits == 8:
        return codes
    return torch.cat([(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim)


def _levels(x: Tensor, dim: int, form: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels as uint8, and float16 scale and middle of the groups along ``dim``, which both keep."""
    if form.floating:
        scale, middle = _up(x.abs().amax(dim, keepdim=True), form.reach), None
        units = x / torch.where(scale == 0, 1, scale.float())
        return units.to(torch.float8_e4m3fn).view(torch.uint8), scale, middle
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    middle = (low / 2 + high / 2).half()
    scale = _up(torch.maximum(high - middle.float(), middle.float() - low), form.reach)
    units = (x - middle.float()) / torch.where(scale == 0, 1, scale.float())
    half = 2 ** (form.bits - 1)
    levels = (units + half).floor().clamp(0, 2 * half - 1)
    if form.bits == 8:  # signed, as processors have it
        return (levels - half).to(torch.int8).view(torch.uint8), scale, middle
    return levels.to(torch.uint8), scale, middle


def _numbers(codes: Tensor, form: Format, dim: int = -1) -> Tensor:
    """Levels as float32, the middle at 0."""
    if form.floating:
        return codes.view(torch.float8_e4m3fn).float()
    if form.bits == 8:
        return codes.view(torch.int8).float() + 0.5
    return unpack(codes, form.bits, dim).float() - form.reach


def _mark(
    index: Tensor, scale: Tensor, middle: Tensor | None, scales: Tensor, middles: Tensor | None, dim: int
) -> Tensor:
    sound = scale.isfinite().all()
    scales.index_copy_(0, index, torch.where(scale.isfinite(), scale, torch.nan).squeeze(dim))
    if middle is not None and middles is not None:
        sound = sound & middle.isfinite().all()
        middles.index_copy_(0, index, torch.where(middle.isfinite(), middle, torch.nan).squeeze(dim))
    return sound


def _up(x: Tensor, parts: float) -> Tensor:
    """The least float16 that is not below ``x / parts``, neither of which is below 0."""
    x = x / torch.full_like(x, parts)  # by a number, a GPU would multiply by its rounded inverse
    nearest = x.half()
    return torch.where(nearest.float() < x, (nearest.view(torch.int16) + 1).view(torch.float16), nearest)
