"""Snapshots as the page's scripts read them: texts once for all arms that read them, kept entries as packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvthrift.eval.snapshot import Snapshot


def plain(groups: Sequence[tuple[str, Sequence[Snapshot]]]) -> dict[str, Any]:
    """Plain data of snapshots.

    Args:
        groups: snapshots, each group with the name of its run; empty where there is none.

    Returns:
        ``texts``: what was read and by whom it was asked for; ``arms``: one for each snapshot, with the number of its
        text.
    """
    texts: list[dict[str, Any]] = []
    arms: list[dict[str, Any]] = []
    places: dict[tuple[Any, ...], int] = {}
    for run, snapshots in groups:
        for snapshot in filter(lambda one: one.layers, snapshots):  # without layers nothing was compressed
            key = (run, snapshot.task, snapshot.sample, snapshot.question, snapshot.tokens)
            if key not in places:
                places[key] = len(texts)
                texts.append(_text(run, snapshot))
            arms.append(_arm(places[key], snapshot))
    return {"texts": texts, "arms": arms}


def _text(run: str, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "run": run,
        "task": snapshot.task,
        "sample": snapshot.sample,
        "question": snapshot.question,
        "tokens": list(snapshot.tokens),
        "spans": [list(span) for span in snapshot.answer_spans],
        "full_answer": snapshot.full_answer,
    }


def _arm(text: int, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "text": text,
        "arm": snapshot.arm,
        "method": snapshot.method,
        "budget": snapshot.budget,
        "layers": list(snapshot.layers),
        "heads": snapshot.heads,
        "lengths": [list(layer) for layer in snapshot.lengths],
        "kept": snapshot.plain()["kept"],
        "answer": snapshot.answer,
    }
