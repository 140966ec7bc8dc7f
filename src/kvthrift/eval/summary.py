"""Means over rows of one arm: cost, agreement with the full cache, what eviction did. Knows nothing of pairs or tables.

A mean is over the rows that have the number; where none has it, it is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from kvthrift.eval.metrics.agreement import Agreement
from kvthrift.eval.metrics.physics import ALARM, decompose
from kvthrift.eval.rows import Row

RIGHT = 0.5  # a score from here on counts as right where a yes or no is asked for
GONE = 0.5  # a share of what an answer needs, layer by layer, from which it counts as erased
STEEP = 0.9  # a share removed from which results fall off a cliff
HORIZON = 16  # steps at which answers are asked whether they still agree

Plain = dict[str, Any]


def mean_of(rows: Sequence[Row], pick: Callable[[Row], Any]) -> float | None:
    """Mean of a number over the rows that have it."""
    found = [value for row in rows if (value := pick(row)) is not None]
    return fmean(found) if found else None


def failures(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows failed, by reason."""
    return dict(Counter(row["error"]["reason"] for row in rows if row["error"]))


def cost_of(rows: Sequence[Row]) -> Plain:
    """Bytes over all rows that went through; seconds and peak over those where the arm read by itself, undisturbed."""
    through = [row for row in rows if not row["error"]]
    alone = [row for row in through if row["alone"] and not row.get("workers")]
    sizes = ("entries", "full_entries", "bytes", "metadata_bytes", "full_bytes", "read_bytes")
    out: Plain = {name: mean_of(through, lambda row, name=name: row[name]) for name in sizes}  # type: ignore[misc]
    out["share"] = mean_of(through, lambda row: row["bytes"] / row["full_bytes"] if row["full_bytes"] else None)
    out["peak_bytes"] = mean_of(alone, lambda row: row["peak_bytes"])
    for name in ("prefill", "question", "compression", "step"):
        out[f"{name}_seconds"] = mean_of(alone, lambda row, name=name: row["seconds"][name])  # type: ignore[misc]
    out["timed"] = len(alone)
    return out


def agreement_of(rows: Sequence[Row], full: Sequence[Row]) -> Plain | None:
    """How far answers agree with the full cache's, over all tokens of all questions; None if no row says.

    Args:
        rows: of one arm.
        full: of the full cache, for the same samples in the same order.
    """
    pairs = [(row, other) for row, other in zip(rows, full, strict=True) if row.get("agreement")]
    found = [Agreement.from_plain(turn) for row, _ in pairs for turn in row["agreement"]]
    if not found:
        return None
    sure = [Agreement.from_plain(turn) for row, other in pairs if other["score"] >= RIGHT for turn in row["agreement"]]
    parted = [one.first_divergence for one in found if one.first_divergence is not None]
    steps = sum(one.steps for one in found)
    kl = [value for one in found for value in one.kl if value is not None]
    return {
        "answers": len(found),
        "steps": steps,
        "first_token": fmean(one.first_token for one in found),
        "mismatch": _mismatch(found),
        "mismatch_where_right": _mismatch(sure),
        "top1": fmean(one.top1 for one in found),
        "top5": sum(one.top5 * one.steps for one in found) / steps,
        "kl": fmean(kl) if kl else None,
        "identical": 1 - len(parted) / len(found),
        "median_divergence": median(parted) if parted else None,
        f"agree_{HORIZON}": _agreeing(found),
    }


def _mismatch(found: Sequence[Agreement]) -> float | None:
    """Mismatches a step, first tokens left out."""
    wrong, steps = (sum(one.later[place] for one in found) for place in (0, 1))
    return wrong / steps if steps else None


def _agreeing(found: Sequence[Agreement]) -> float | None:
    """Share of the answers of at least that many steps that still agree at the horizon."""
    long = [one for one in found if one.steps >= HORIZON]
    return fmean(one.first_divergence is None or one.first_divergence >= HORIZON for one in long) if long else None


def flips_of(rows: Sequence[Row], full: Sequence[Row]) -> Plain:
    """Samples that the full cache gets right and this arm wrong, and the other way round."""
    pairs = [(row["score"] >= RIGHT, other["score"] >= RIGHT) for row, other in zip(rows, full, strict=True)]
    return {
        "right_to_wrong": sum(before and not after for after, before in pairs),
        "wrong_to_right": sum(after and not before for after, before in pairs),
    }


def physics_of(rows: Sequence[Row]) -> Plain | None:
    """What eviction did to contexts and answers; None if no row says.

    Failures are split by whether half of what the answer needs, layer by layer, is gone.
    """
    through = [row for row in rows if row.get("physics")]
    if not through:
        return None
    needing = [row for row in through if row["physics"]["relevant"]]
    out: Plain = {name: _mean(through, name) for name in ("removed", "evicted_layer", "evicted_model")}
    out |= {name: _mean(needing, name) for name in ("ger_layer", "ger_model", "chance_layer", "chance_model")}
    out["consensus"], out["rigidity"] = (_mean_layers(through, name) for name in ("consensus", "rigidity"))
    gone = [row["physics"]["ger_layer"] >= GONE for row in needing]
    split = decompose([row["score"] < RIGHT for row in needing], gone)
    out["failures"] = None if split is None else asdict(split)
    out["alarm"] = (out["ger_layer"] or 0) >= ALARM or out["removed"] >= STEEP
    return out


def _mean(rows: Sequence[Row], name: str) -> float | None:
    return mean_of(rows, lambda row: row["physics"][name])


def _mean_layers(rows: Sequence[Row], name: str) -> float | None:
    return mean_of(rows, lambda row: fmean(row["physics"][name]) if row["physics"][name] else None)
