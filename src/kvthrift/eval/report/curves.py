"""Agreement with the full cache by the position in the answer, and scores by where a needle lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from kvthrift.eval.folder import Run
from kvthrift.eval.rows import Row
from kvthrift.eval.table import ALL, SCALE, Scored

POSITIONS = 64  # columns of the map at most; longer answers have several tokens a column


def agreement(scored: Scored) -> dict[str, Any] | None:
    """How often each arm says the full cache's token, by position in the answer; None if no row says.

    Returns:
        ``width``: positions a column; by task (and "all") and arm, in ``arms``: share of the answers that are so long
        whose likeliest tokens there are the full cache's, and in ``answers`` how many those are.
    """
    longest = max((turn["steps"] for rows in scored.values() for line in rows for turn in _turns(line)), default=0)
    if not longest:
        return None
    width = -(-longest // POSITIONS)
    by_task = {**({ALL: _together(scored)} if len(scored) > 1 else {}), **scored}
    if len(scored) == 1:
        by_task = {ALL: next(iter(scored.values()))}
    return {
        "width": width,
        "arms": {task: [_shares(rows, longest, width) for rows in lines] for task, lines in by_task.items()},
        "answers": {task: _answers(lines, longest, width) for task, lines in by_task.items()},
    }


def _together(scored: Scored) -> list[list[Row]]:
    return [[row for rows in lines for row in rows] for lines in zip(*scored.values(), strict=True)]


def _turns(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [turn for row in rows for turn in row.get("agreement") or ()]


def _shares(rows: Sequence[Row], longest: int, width: int) -> list[float | None]:
    """One share a column; None where no answer is so long."""
    asked, agreed = [0] * longest, [0] * longest
    for turn in _turns(rows):
        wrong = set(turn["mismatches"])
        for step in range(turn["steps"]):
            asked[step] += 1
            agreed[step] += step not in wrong
    cuts = [slice(at, at + width) for at in range(0, longest, width)]
    return [round(sum(agreed[cut]) / sum(asked[cut]), 4) if sum(asked[cut]) else None for cut in cuts]


def _answers(lines: Sequence[Sequence[Row]], longest: int, width: int) -> list[int]:
    """Answers that reach each column, of the arm that has most."""
    return [max(sum(turn["steps"] > at for turn in _turns(rows)) for rows in lines) for at in range(0, longest, width)]


def needles(run: Run, question: str, scored: Scored) -> list[dict[str, Any]]:
    """Mean scores, 0 to 100, by arm, task, length and depth, of the samples that say where their needle lies."""
    found: dict[tuple[str, str, int, float], list[float]] = {}
    for task, lines in scored.items():
        for arm, rows in zip(run.arms, lines, strict=True):
            for row in rows:
                depth = row.get("meta", {}).get("depth")
                if isinstance(depth, (int, float)):
                    key = (arm.name, task, int(row["meta"].get("length", run.grid.length)), round(float(depth), 3))
                    found.setdefault(key, []).append(SCALE * row["score"])
    return [
        {"question": question, "arm": arm, "task": task, "length": length, "depth": depth,
         "score": round(fmean(scores), 4), "samples": len(scores)}
        for (arm, task, length, depth), scores in found.items()
    ]  # fmt: skip
