"""What entries receive from queries while the model runs, as planes of the store that grow with every pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kvthrift import kernels
from kvthrift.core import LayerView, Signals
from kvthrift.runtime.step import Step
from kvthrift.score.window import smooth
from kvthrift.store import Held

COLUMNS = "columns"


def plane_names(observes: Signals) -> tuple[str, ...]:
    """The planes that such signals are kept in."""
    return (*((COLUMNS,) if observes.columns else ()), *(wanted.plane for wanted in observes.powers))


def show(view: LayerView, observes: Signals, planes: dict[str, Tensor]) -> None:
    """Let parts see what is kept in planes."""
    view.columns = planes.get(COLUMNS) if observes.columns else None
    view.powers = {wanted: planes[wanted.plane] for wanted in observes.powers if wanted.plane in planes}


def of_pass(observes: Signals, view: LayerView, q: Tensor, lse: Tensor | None, step: Step) -> dict[str, Tensor]:
    """What a pass over several tokens adds to each plane, ``[B, H, T]`` float32 each.

    Args:
        view: all entries there are, those of the pass included.
        q: ``[B, HG, Q, D]`` packed; lse: ``[B, HG, Q]`` over all they see.
    """
    if lse is None:
        raise ValueError("sums of attention need the log-sum-exp of the attention they are sums of")
    positions = step.positions.masked_fill(~step.real, -1) if step.padded else step.positions
    out: dict[str, Tensor] = {}
    if observes.columns:
        out[COLUMNS] = kernels.column_sums(
            q, view.keys, q_positions=positions, k_positions=view.positions, valid=view.valid, scale=view.scale,
            lse=lse, bias=view.bias,
        )  # fmt: skip
    for wanted in observes.powers:
        last = slice(-wanted.window if wanted.window and not step.padded else None, None)
        rows = positions[:, last]
        if wanted.window:
            rows = rows.masked_fill(rows < view.seen[:, None] - wanted.window, -1)
        sums = kernels.power_sums(
            q[:, :, last], view.keys, q_positions=rows, k_positions=view.positions, valid=view.valid, scale=view.scale,
            lse=lse[..., last], bias=view.bias, power=wanted.power, buffer=wanted.buffer,
            products=wanted.products,
        )  # fmt: skip
        out[wanted.plane] = smooth(sums, "max", wanted.kernel).sum(dim=2)
    return out


def of_step(observes: Signals, held: Held, q: Tensor, at: Tensor, scale: float) -> dict[str, Tensor]:
    """What one decode step adds to each plane, ``[B, H, T]`` float32 each.

    Args:
        held: all entries there are, the step's own included.
        q: ``[B, HG, 1, D]``; at: ``[B, 1]`` int64 true positions.
    """
    out: dict[str, Tensor] = {}
    if observes.columns:
        out[COLUMNS] = kernels.entry_attention(q, held.keys, valid=held.valid, scale=scale, bias=held.mass)
    for wanted in observes.powers:
        found = kernels.entry_attention(q, held.keys, valid=held.valid, scale=scale, bias=held.mass, power=wanted.power)
        far = held.positions <= at[:, :, None] - wanted.buffer
        out[wanted.plane] = torch.where(far, found * (q.shape[1] // held.keys.shape[1]), 0.0)
    return out
