"""How a read of pages is cut into programs, and the scratch in which their parts meet.

The numbers are measured (benchmarks/gpu/decode_kernel.py): a plan is right for any lengths, and fast for about as many
pages as it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvthrift.errors import OptionError

_LONGEST_RUN = 32  # pages that one program reads, where what follows does not apply
_LONGEST_ALONE = 64  # the same, where one program is enough to keep a multiprocessor reading
_MANY, _MANY_CODED = 4, 16  # pages a program from which on all programs begin together, as many as have room at once
_WORTH_TWO = 16  # pages a program from which on programs may begin in two goes
_HELPERS = 8  # programs that join the parts of a long row; 0: the last to arrive does it alone
_PATIENCE = {True: 64, False: 4}  # looks of a helper at what is missing; with few programs all of them run at once


@dataclass(frozen=True)
class Cut:
    """How many programs share a read.

    Attributes:
        programs: equal runs that the pages of all rows are cut into.
        grid: programs that are launched: as many, or more where runs end with rows (``aligned``) and some are shorter.
        even: every row is as long as the first, so that nothing need be summed up; where ``programs`` is a multiple
            of the rows, each row is cut by itself.
        aligned: no run has pages of two rows; always so where rows are even and ``programs`` a multiple of them.
        few: at most two programs for a multiprocessor, each of which had better have many pages on their way.
        late: the launch behind may begin when pages are read, not at once: where unequal programs have many of them,
            waiting ones would keep a multiprocessor's room from those that are at work.
    """

    programs: int
    grid: int
    even: bool
    aligned: bool
    few: bool
    late: bool


@dataclass(frozen=True)
class ReadPlan(Cut):
    """A cut, and where its parts meet; made once and used step after step.

    Attributes:
        parts: ``[grid + rows, queries, Dv]`` float32 scratch.
        lses: ``[grid + rows, queries]`` float32 scratch.
        arrived: ``[rows]`` int32, all zero between reads.
        turns: ``[rows]`` int32, of which but the highest bit is zero between reads.
        helpers: programs that join a long row's parts, a slice of the channels each; a power of two, 0 for the last
            to arrive alone.
        polls: how often a helper looks whether all have arrived before it leaves its slice to the last.
    """

    parts: Tensor
    lses: Tensor
    arrived: Tensor
    turns: Tensor
    helpers: int
    polls: int

    @property
    def bytes(self) -> int:
        """Bytes of the scratch."""
        return sum(t.numel() * t.element_size() for t in (self.parts, self.lses, self.arrived, self.turns))


def plan_read(
    rows: int,
    pages: int,
    queries: int,
    value_dim: int,
    device: torch.device,
    *,
    even: bool = False,
    coded: bool = False,
    programs: int = 0,
    aligned: bool | None = None,
    helpers: int = _HELPERS,
) -> ReadPlan:
    """Cut a read so that the device is filled, and yet no run is too short to be worth a part.

    Args:
        rows: heads of all sequences.
        pages: of all rows together.
        queries: query vectors a row (group times query length).
        value_dim: Dv.
        device: where the scratch lives.
        even: all rows are, and will be, equally long.
        coded: pages are in few bits, which programs of one warp read.
        programs: or 0, chosen from the device's multiprocessors.
        aligned, helpers: see :class:`ReadPlan`; for measuring. Runs end with rows where rows are few.

    Raises:
        OptionError: ``helpers`` is not 0, 2, 4 or 8.
    """
    if helpers not in (0, 2, 4, 8):
        raise OptionError(f"helpers={helpers} cannot share out the channels of a part: 0, 2, 4 or 8 can.")
    each = multiprocessors(device)
    cut = cut_read(rows, pages, queries, value_dim, each, even=even, coded=coded, programs=programs, aligned=aligned)
    return with_scratch(cut, rows, queries, value_dim, device, helpers=helpers)


def with_scratch(
    cut: Cut, rows: int, queries: int, value_dim: int, device: torch.device, *, helpers: int = _HELPERS
) -> ReadPlan:
    """A plan of its own; reads that follow one another may share it, and those of one cut had better."""
    return ReadPlan(
        **vars(cut),
        parts=torch.empty(cut.grid + rows, queries, value_dim, dtype=torch.float32, device=device),
        lses=torch.empty(cut.grid + rows, queries, dtype=torch.float32, device=device),
        arrived=torch.zeros(rows, dtype=torch.int32, device=device),
        turns=torch.zeros(rows, dtype=torch.int32, device=device),
        helpers=helpers,
        polls=_PATIENCE[cut.few],
    )


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; what is interpreted elsewhere has four."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cut_read(
    rows: int,
    pages: int,
    queries: int,
    value_dim: int,
    each: int,
    *,
    even: bool = False,
    coded: bool = False,
    programs: int = 0,
    aligned: bool | None = None,
) -> Cut:
    """See :func:`plan_read`, for a device of ``each`` multiprocessors."""
    if aligned is None:
        aligned = not coded and rows <= each and pages <= _LONGEST_RUN * 2 * each
    aligned = aligned and not even
    alone = value_dim == 128 and queries <= 16 and not coded
    programs = programs or _programs(rows, pages, each, even=even, aligned=aligned, coded=coded, alone=alone)
    programs, few = max(programs, 1), programs <= 2 * each
    grid = programs + rows if aligned else programs  # a run more a row: the last of each may be short
    return Cut(programs, grid, even, aligned, few, late=few and aligned and programs > each)


def _programs(rows: int, pages: int, each: int, *, even: bool, aligned: bool, coded: bool, alone: bool) -> int:
    """As many as were the fastest on 132 multiprocessors, in terms of how many there are (``each``)."""
    if even and alone and 0 < rows <= each and (found := _one_each(rows, pages, each)):
        return found
    most, short = (4 * each, 2) if coded else (2 * each, 4)
    run = max(1, min(_LONGEST_RUN, max(-(-pages // most), min(short, round(pages / each)))))
    programs = rows * -(-pages // (rows * run)) if even and rows else -(-pages // run)
    if aligned:
        if each < programs <= 2 * each:  # with a run more a row they still fit, and start together
            return each * 17 // 10 - rows if rows <= each // 2 else each * 16 // 11
        return programs
    places = (8 if coded else 4) * each
    if pages < (_MANY_CODED if coded else _MANY) * places or (even and programs <= 2 * each):
        return programs
    return (_whole_rows(rows, pages, places) if even else 0) or places


def _one_each(rows: int, pages: int, each: int) -> int:
    """Programs of whole rows, one a multiprocessor; 0 where that leaves many without, or is not enough."""
    splits = each // rows
    if rows * splits < each * 7 // 8 or pages > _LONGEST_ALONE * rows * splits:
        return 0
    run = max(1, -(-pages // (rows * splits)), min(4, round(pages / each)))
    return rows * -(-pages // (rows * run))


def _whole_rows(rows: int, pages: int, places: int) -> int:
    """Programs that cut each row by itself and nearly fill the places, once or twice over; 0 if there are none."""
    for room in (places, 2 * places):
        programs = room // rows * rows
        if programs >= room * 19 // 20 and (room == places or pages >= _WORTH_TWO * room):
            return programs
    return 0
